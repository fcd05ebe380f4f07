"""What the user froze stays frozen, and a reference that nothing of training disturbs."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from test_unpaired_trainer import rows as answers  # noqa: E402
from test_unpaired_trainer import trainer as unpaired_trainer  # noqa: E402
from tiny import history, lora, trainer  # noqa: E402

from fastpref.heads.modes import evaluating  # noqa: E402
from fastpref.reference import model as refs  # noqa: E402

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MAKE = {"pairs": trainer, "answers": unpaired_trainer}


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def only_lora_b(model):
    """LoRA-FA: A stays as it is."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name and "lora_B" in name)
    return model


def asked(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted(**kwargs):
    from peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(tiny.model(), lora(**kwargs))


# ---- frozen weights ----


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("reference", ["adapter off", "ref adapter", "model"])
def test_only_what_was_asked_moves(tmp_path, kind, reference):
    options = {"max_steps": 3, "learning_rate": 1e-2}
    if reference == "adapter off":
        t = MAKE[kind](tmp_path, peft_config=lora(), **options)
        only_lora_b(t.model)
    else:
        model = only_lora_b(adapted(init_lora_weights=False))
        ref = {"ref_model": tiny.model()} if reference == "model" else {}
        t = MAKE[kind](tmp_path, model, **ref, **options)
    names, before = asked(t.model), {n: p.clone() for n, p in t.model.named_parameters()}
    assert names and all("lora_B" in name for name in names)
    t.train()
    assert asked(t.model) == names
    moved = {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names


@pytest.mark.parametrize("kind", MAKE)
def test_loading_a_checkpoint_leaves_it_frozen(tmp_path, kind):
    def start():
        data = answers(5, seed=3) if kind == "answers" else tiny.rows(5, seed=3)
        return MAKE[kind](
            tmp_path, only_lora_b(adapted(init_lora_weights=False)), eval_dataset=data,
            max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        )  # fmt: skip

    whole = start()
    names = asked(whole.model)
    whole.train()
    assert asked(whole.model) == names
    resumed = start()
    before = {n: p.clone() for n, p in resumed.model.named_parameters()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert asked(resumed.model) == names
    moved = {n for n, p in resumed.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    tiny.same(history(whole)[2:], history(resumed)[2:], ("loss", "grad_norm"), tol=1e-6)


def test_a_reference_adapter_of_ones_own_and_base_weights(tmp_path):
    """Whatever is trainable where the reference is asked is so afterwards, on an error, too."""
    model = adapted(init_lora_weights=False)
    refs.add_reference_adapter(model)
    only_lora_b(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    names = asked(model)
    with refs.as_reference(model):
        assert model.active_adapters == ["ref"]
    assert asked(model) == names and model.active_adapters == ["default"]
    with pytest.raises(KeyError), refs.as_reference(model):
        raise KeyError
    assert asked(model) == names and model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", MAKE)
def test_nothing_to_train_is_an_error_before_the_first_step(tmp_path, kind):
    from peft import PeftModel

    make = MAKE[kind]
    t = make(tmp_path, tiny.model().requires_grad_(False))
    with pytest.raises(ValueError, match="^model: got one whose weights are all frozen"):
        t.train()
    assert not history(t)
    with pytest.raises(ValueError, match="^model: got one whose weights are all frozen"):
        make(tmp_path, tiny.model().requires_grad_(False), precompute_ref_log_probs=True)
    adapted().save_pretrained(tmp_path / "adapter")
    for options in ({}, {"ref_model": tiny.model()}):
        loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter")
        with pytest.raises(ValueError, match="is_trainable=True"):
            make(tmp_path, loaded, **options).train()
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True)
    make(tmp_path, loaded, max_steps=1).train()


def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    from fastpref import PreferenceTrainer

    def start(model, optimizer, **kwargs):
        return PreferenceTrainer(
            model, args=tiny.config(tmp_path, max_steps=1), train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(), optimizers=(optimizer, None), **kwargs,
        )  # fmt: skip

    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^optimizers: got an optimizer that holds none"):
        start(model, optimizer, peft_config=lora())
    with pytest.raises(ValueError, match="^optimizers: got"):
        start(tiny.model(), optimizer)
    model = tiny.model()
    part = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    t = start(model, part)
    before = {n: p.clone() for n, p in model.named_parameters()}
    t.train()
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == [
        "lm_head.weight"
    ]


# ---- evaluation mode ----


def modes_of_reference(t, model):
    """The modes of the model's modules whenever the reference's log-probs are computed."""
    seen, own = [], t.reference_sums

    def sums(reference, batch):
        handle = model.model.layers[0].register_forward_hook(
            lambda *_: seen.append([m.training for m in model.modules()])
        )
        try:
            return own(reference, batch)
        finally:
            handle.remove()

    t.reference_sums = sums
    return seen


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [True, False])
def test_the_reference_is_in_evaluation_mode(tmp_path, kind, checkpointing, dropout):
    t = MAKE[kind](
        tmp_path, tiny.model(attention_dropout=0.5), peft_config=lora(lora_dropout=0.5),
        disable_dropout=not dropout, neftune_noise_alpha=5, max_steps=2, learning_rate=0.0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    base = t.model.get_base_model()
    seen = modes_of_reference(t, base)
    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    before, values, own = t.reference_logps(batch), [], t.reference_logps
    t.reference_logps = lambda inputs: (values.append(own(batch)), own(inputs))[1]
    t.train()
    assert len(values) >= 2 and all(torch.equal(value, before) for value in values)
    assert seen and not any(map(any, seen))


def test_modes_come_back_as_they_were(tmp_path):
    t = trainer(tmp_path, peft_config=lora())
    base = t.model.get_base_model()
    t.model.train()
    base.model.layers[1].eval()  # the user's choice
    before = [m.training for m in t.model.modules()]
    assert True in before and False in before
    t.reference_logps(t.data_collator([t.train_dataset[i] for i in range(2)]))
    assert [m.training for m in t.model.modules()] == before
    with pytest.raises(KeyError), evaluating(t.model):
        assert not any(m.training for m in t.model.modules())
        raise KeyError
    assert [m.training for m in t.model.modules()] == before


def test_the_policys_kl_pass_has_the_noise_of_its_rewards(tmp_path):
    """KTO holds the rewards, which are of the policy as it trains, against this estimate."""
    t = unpaired_trainer(tmp_path, neftune_noise_alpha=50, max_steps=2, learning_rate=0.0)
    modes = []
    t.model.model.layers[0].register_forward_hook(lambda *_: modes.append(t.model.training))
    t.train()
    assert modes == [True] * 4  # of each step the KL pass and the training pass
    modes.clear()
    t.evaluate(answers(4, seed=5))
    assert modes == [False] * 2


def test_a_routers_jitter_is_not_in_the_reference(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    moe = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, router_jitter_noise=0.9, pad_token_id=0, eos_token_id=1,
            bos_token_id=1,
        )
    )  # fmt: skip
    t = trainer(tmp_path, moe, peft_config=lora())
    batch = t.data_collator([t.train_dataset[i] for i in range(2)])
    t.model.eval()
    before = t.reference_logps(batch)
    t.model.train()
    assert torch.equal(t.reference_logps(batch), before)
