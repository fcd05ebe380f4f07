"""Write tests/golden/losses.json: what TRL's own code makes of fixed inputs.

    python scripts/make_golden_losses.py         # needs trl 1.16; seconds

Each case has the name of a loss and its options as fastpref spells them, TRL's loss and its
gradient in every token's log-probability. The trainers' loss methods run as they are, on a stand-in
for the trainer and a model that returns the fixed log-probabilities; nothing is trained and nothing
of fastpref is imported. tests/losses/test_loss_golden.py compares.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

OUTPUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "losses.json"
PAIRS, LENGTH, PROMPT = 4, 9, 3

F_DIVERGENCES: list[dict] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
]
DPO: list[dict] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "beta": 0.5},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "exo_pair", "label_smoothing": 0.001},
    {"loss_type": "exo_pair", "label_smoothing": 0.2},
    {"loss_type": "nca_pair"},
    {"loss_type": "robust"},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "aot"},
    {"loss_type": "aot", "label_smoothing": 0.2},
    {"loss_type": "aot_unpaired"},
    {"loss_type": "aot_unpaired", "label_smoothing": 0.2},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "discopop"},
    {"loss_type": "discopop", "discopop_tau": 0.3, "beta": 0.4},
    {"loss_type": "sft"},
    {"loss_type": "sigmoid_norm", "beta": 2.0},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["ipo", "apo_zero"]},
    *({"loss_type": "sigmoid", **f} for f in F_DIVERGENCES),
    *({"loss_type": "ipo", **f} for f in F_DIVERGENCES),
    *(
        {"loss_type": name, "f_divergence_type": "js_divergence", **more}
        for name, more in (
            ("sigmoid_norm", {"beta": 2.0}),
            ("hinge", {}),
            ("exo_pair", {"label_smoothing": 0.1}),
            ("robust", {"label_smoothing": 0.1}),
            ("discopop", {}),
            ("sft", {}),
        )
    ),
    {"loss_type": "sigmoid", "ld_alpha": 0.4},
    {"loss_type": "ipo", "ld_alpha": 0.0},
    {"loss_type": ["sigmoid_norm", "sft"], "ld_alpha": 0.7},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": ["robust", "ipo"], "loss_weights": [1.0, 0.5], "use_weighting": True},
]
# TRL's CPO trainer has CPO, SimPO and AlphaPO; `nll_weight` is its cpo_alpha.
CPO: list[dict] = [
    {"loss_type": "cpo"},
    {"loss_type": "cpo", "nll_weight": 0.0, "label_smoothing": 0.1},
    {"loss_type": "simpo", "beta": 2.0},
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "nll_weight": 1.0},
    {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1},
    {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25},
    {"loss_type": "alphapo", "beta": 2.0, "alpha": -0.5, "simpo_gamma": 0.1},
]
ORPO: list[dict] = [{"loss_type": "orpo"}, {"loss_type": "orpo", "beta": 0.7}]
KTO: list[dict] = [
    {"loss_type": "kto"},
    {"loss_type": "kto", "beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.5},
    {"loss_type": "apo_zero_unpaired"},
    {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.2, "undesirable_weight": 2.0},
]
REWARD: list[dict] = [
    {},
    {"margin": True},
    {"margin": True, "center_rewards_coefficient": 0.01},
]


def make_inputs() -> dict[str, torch.Tensor]:
    """Fixed random inputs. The answers differ in length, and the last one has one token."""
    torch.manual_seed(7)
    rows = 2 * PAIRS
    mask = torch.zeros(rows, LENGTH, dtype=torch.long)
    for row, end in enumerate((9, 5, 7, 4, 6, 8, 4, 9)):
        mask[row, PROMPT:end] = 1
    double = {"dtype": torch.float64}
    return {
        "completion_mask": mask,
        # log p of the token at t + 1, everywhere; the losses see those of the completions.
        "token_logps": -3 * torch.rand(rows, LENGTH - 1, **double),
        "log_sum_sq_probs": -2 * torch.rand(rows, LENGTH - 1, **double),
        "ref_token_logps": -3 * torch.rand(rows, LENGTH - 1, **double),
        "kl_logps": -9 * torch.rand(rows, **double),
        "ref_kl_logps": -12 * torch.rand(rows, **double) - 4,
        "desirable": torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool),
        "scores": torch.randn(rows, **double),
        "margin": torch.rand(PAIRS, **double),
    }


def same(t: torch.Tensor) -> torch.Tensor:
    return t


def stand_in(**attributes: Any) -> SimpleNamespace:
    """A trainer that has what a loss method reads and no more."""
    here = torch.device("cpu")
    return SimpleNamespace(
        model=torch.nn.Module(),  # in training mode
        accelerator=SimpleNamespace(device=here, gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def model_of(logps: torch.Tensor, mask: torch.Tensor, statistic: torch.Tensor) -> Any:
    kept = mask[:, 1:]

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=logps * kept,  # TRL's head gives 0 where a label is ignored
            log_sum_sq_probs=statistic * kept,
            entropy=torch.ones_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
        )

    return model


def dpo(case: dict, data: dict[str, torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    from trl import DPOTrainer

    mask, name = data["completion_mask"], case["loss_type"]
    names = [name] if isinstance(name, str) else name
    trainer = stand_in(
        ld_alpha=case.get("ld_alpha"),
        precompute_ref_logps=False,
        f_divergence_type=case.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=case.get("f_alpha_divergence_coef", 0.5),
        loss_types=names,
        loss_weights=case.get("loss_weights", [1.0] * len(names)),
        beta=case.get("beta", 0.1),
        label_smoothing=case.get("label_smoothing", 0.0),
        use_weighting=case.get("use_weighting", False),
        args=SimpleNamespace(
            discopop_tau=case.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None
        ),
    )
    statistic = data["log_sum_sq_probs"].to(logps.dtype)
    trainer.ref_model = model_of(data["ref_token_logps"].to(logps.dtype), mask, statistic)
    trainer.model.is_gradient_checkpointing = False
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    return DPOTrainer._compute_loss(trainer, model_of(logps, mask, statistic), inputs, False)


def sums_and_means(data: dict, logps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kept = data["completion_mask"][:, 1:]
    sums = (logps * kept).sum(1)
    nll = -sums[:PAIRS].sum() / kept[:PAIRS].sum()
    return sums, sums / kept.sum(1), nll


def cpo(case: dict, data: dict[str, torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    from trl.experimental.cpo import CPOTrainer

    sums, means, nll = sums_and_means(data, logps)
    own = case["loss_type"]
    trainer = stand_in(
        loss_type="sigmoid" if own == "cpo" else "simpo",
        alpha=case.get("alpha", 0.0),
        beta=case.get("beta", 0.1),
        simpo_gamma=case.get("simpo_gamma", 0.5),
        label_smoothing=case.get("label_smoothing", 0.0),
    )
    given = (sums if own == "cpo" else means).split(PAIRS)
    losses, *_ = CPOTrainer.cpo_loss(trainer, *given)
    weight = case.get("nll_weight", 1.0 if own == "cpo" else 0.0)
    return losses.mean() + weight * nll


def orpo(case: dict, data: dict[str, torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    from trl.experimental.orpo import ORPOTrainer

    _, means, nll = sums_and_means(data, logps)
    trainer = stand_in(beta=case.get("beta", 0.1))
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means.split(PAIRS))
    return nll - losses.mean()


def kto(case: dict, data: dict[str, torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    from trl import KTOTrainer

    mask = data["completion_mask"]
    has_kl = case["loss_type"] == "kto"
    trainer = stand_in(
        calculate_KL=has_kl,
        loss_type=case["loss_type"],
        beta=case.get("beta", 0.1),
        desirable_weight=case.get("desirable_weight", 1.0),
        undesirable_weight=case.get("undesirable_weight", 1.0),
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: data["kl_logps"] if has_kl else None,
    )
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": data["desirable"],
        "ref_logps": (data["ref_token_logps"] * mask[:, 1:]).sum(1).to(logps.dtype),
        "ref_KL_logps": data["ref_kl_logps"],
    }
    model = model_of(logps, mask, data["log_sum_sq_probs"])
    return KTOTrainer._compute_loss(trainer, model, batch, False)


def reward(case: dict, data: dict[str, torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    from trl import RewardTrainer

    trainer = stand_in(
        args=SimpleNamespace(center_rewards_coefficient=case.get("center_rewards_coefficient"))
    )
    inputs = {"attention_mask": data["completion_mask"]}
    if case.get("margin"):
        inputs["margin"] = data["margin"]
    outputs = SimpleNamespace(logits=scores[:, None])
    return RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)


GROUPS = {"dpo": (dpo, DPO), "cpo": (cpo, CPO), "orpo": (orpo, ORPO), "kto": (kto, KTO)}
GROUPS["reward"] = (reward, REWARD)


def compute() -> dict[str, Any]:
    """Inputs, and every case with TRL's loss and gradient."""
    import trl

    data = make_inputs()
    cases = []
    for group, (function, options) in GROUPS.items():
        for case in options:
            # TRL's alpha divergence knows no float64, and its ORPO casts to float32.
            single = case.get("f_divergence_type") == "alpha_divergence" or group == "orpo"
            source = data["scores" if group == "reward" else "token_logps"]
            leaf = source.to(torch.float32 if single else torch.float64).requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = function(case, data, leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
            cases.append(
                {
                    "group": group,
                    "options": case,
                    "dtype": str(leaf.dtype)[6:],
                    "loss": loss.item(),
                    "gradient": gradient.double().tolist(),
                }
            )
    inputs = {name: t.tolist() for name, t in data.items()}
    return {"trl": trl.__version__, "inputs": inputs, "cases": cases}


def main() -> None:
    result = compute()
    result = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.12g}"))
    lines = ",\n".join(json.dumps(case) for case in result["cases"])
    head = json.dumps({key: result[key] for key in ("trl", "inputs")})
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(f'{head[:-1]},\n"cases": [\n{lines}\n]}}\n', "utf-8")
    print(f"{OUTPUT}: {len(result['cases'])} cases, {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
