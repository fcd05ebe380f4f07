"""What one line saves: a training step of TRL's DPOTrainer with `fastpref.patch_trl` and without.

    python benchmarks/trl_step.py

One process, one model of random weights (small body, large vocabulary), one trainer; the optimiser
steps with and without the patch alternate, in a new order every round. Each is a whole step of
TRL's: reference, forward, backward, optimiser, metrics. Then, in processes of their own, the peak
memory of a step of each; and the sequences' log-probs of both beside those of float64, from the
same hidden states. All of that with every weight training, and with LoRA. Writes a JSON to
benchmarks/results/, from which benchmarks/tables.py makes the table of docs/trl.md.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import warnings
from typing import Any

import torch
from lib import results

from fastpref.bench import rates, runner
from fastpref.bench.cases import split_names
from fastpref.bench.device import TIGHT_MALLOC, open_device

SIDES = ("TRL", "fastpref")
MODES = ("trainable", "frozen")  # of the head


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--vocab", type=int, default=49152)
    add("--hidden", type=int, default=576)
    add("--layers", type=int, default=4)
    add("--pairs", type=int, default=4, help="pairs a step")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--answer", type=int, default=192, help="tokens of an answer, at most; half at least")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the weights")
    add(
        "--modes",
        default="trainable,frozen",
        help="trainable, frozen or both: all weights train, or LoRA on the body",
    )
    add("--repeats", type=int, default=7, help="timed steps of each side")
    add("--seed", type=int, default=0)
    add("--output", default="trl_step", help="name of the file in results/, or a path")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.modes = split_names(args.modes, MODES)
    if not args.modes or not set(args.modes) <= set(MODES):
        parser.error(f"--modes: got {','.join(args.modes)}, expected trainable, frozen or both")
    return args


def rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Pairs of random token ids, the answers of different lengths, as answers are."""
    draw = random.Random(args.seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(2, args.vocab) for _ in range(n)]

    def answer() -> list[int]:
        return ids(draw.randint(max(1, args.answer // 2), args.answer))

    return [
        {"prompt_ids": ids(args.prompt), "chosen_ids": answer(), "rejected_ids": answer()}
        for _ in range(args.pairs)
    ]


def make_model(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 192),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # logits with a standard deviation of 2, as in head.py
        model.lm_head.weight.mul_(2 / (config.initializer_range * args.hidden**0.5))
    return model.to(getattr(torch, args.dtype))


class Steps:
    """A DPOTrainer of TRL's, taken one optimiser step at a time on one batch."""

    def __init__(self, args: argparse.Namespace, mode: str, folder: str):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        model, reference = make_model(args), make_model(args)
        peft = None
        if mode == "frozen":
            from peft import LoraConfig

            peft, reference = LoraConfig(r=16, target_modules="all-linear"), None
        prepared = Dataset.from_list(rows(args))
        text = [{"prompt": "a ", "chosen": "b", "rejected": "c"}] * args.pairs
        # TRL takes text; the rows of token ids take its place once the trainer is there.
        self.trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.pairs,
                learning_rate=1e-6,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                max_length=None,
                max_steps=1,
            ),
            train_dataset=Dataset.from_list(text),
            processing_class=_tokenizer(),
            peft_config=peft,
        )
        self.trainer.train_dataset = prepared
        self.trainer.create_optimizer()
        self.trainer.model.train()
        loader = self.trainer.get_train_dataloader()
        self.batch = self.trainer._prepare_inputs(next(iter(loader)))

    def __call__(self) -> float:
        loss = self.trainer.compute_loss(self.trainer.model, dict(self.batch))
        loss.backward()
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def sums(self) -> torch.Tensor:
        """The policy's log-probs of the sequences, by the trainer's own head."""
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"]
        out = self.trainer.model(
            input_ids=ids,
            attention_mask=self.batch["attention_mask"],
            labels=ids.masked_fill(mask == 0, -100),
            fused_lm_head=True,
            use_cache=False,
        )
        return out.log_probs.double().sum(-1).cpu()

    @torch.no_grad()
    def truth(self) -> torch.Tensor:
        """The same in float64, from the model's last hidden states."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"]
        states = model.model(input_ids=ids, attention_mask=self.batch["attention_mask"])[0]
        weight = model.lm_head.weight.double()
        out = []
        for row, y, kept in zip(states[:, :-1], ids[:, 1:], mask[:, 1:].bool(), strict=True):
            z = row[kept].double() @ weight.t()
            out.append((z.gather(1, y[kept][:, None])[:, 0] - z.logsumexp(1)).sum())
        return torch.stack(out).cpu()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def patched(side: str) -> Any:
    import fastpref

    return fastpref.patch_trl() if side == "fastpref" else contextlib.nullcontext()


def call(step: Any, side: str) -> Any:
    with patched(side):
        return step()


def answer(request: dict[str, Any], say: Any) -> None:
    """The worker: the peak memory of one warm step of one side."""
    args = argparse.Namespace(**request["options"])
    with tempfile.TemporaryDirectory() as folder, patched(request["side"]):
        step = Steps(args, request["mode"], folder)
        step()  # which also makes the optimiser's state
        say(open_device().peak(step))


def measure(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        step = Steps(args, mode, folder)
        labelled = int(step.batch["completion_mask"][:, 1:].sum())
        positions = step.batch["input_ids"].numel()
        truth = step.truth()
        errors = {side: float((call(step.sums, side) - truth).abs().max()) for side in SIDES}
        losses = {side: call(step, side) for side in SIDES}  # warm-up; the weights move a little
        device = open_device()
        calls = {side: (lambda s=side: call(step, s)) for side in SIDES}
        calls["canary"] = rates.canary(torch.float32)
        cost = {name: device.wall(timed).device for name, timed in calls.items()}
        rounds = runner.Rounds(device, args.repeats, seconds=1e9, seed=args.seed)
        rounds.run(calls, cost, whole=True)
        if rounds.failed:
            raise RuntimeError(f"a step failed: {rounds.failed}")
        timings = rounds.device
    memory = {}
    for side in SIDES:
        request = {"options": vars(args), "mode": mode, "side": side}
        memory[side] = runner.run_worker(__file__, request, TIGHT_MALLOC)
    return {
        "tokens": {"positions": positions, "labelled": labelled},
        "time": {name: timing.to_json() for name, timing in timings.items()},
        "times_faster": round(timings["TRL"].median / timings["fastpref"].median, 3),
        "memory": memory,
        "largest_error_of_a_sequence_nat": errors,
        "first_losses": losses,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    if args.worker:
        runner.serve(answer)
        return
    options = {k: v for k, v in vars(args).items() if k not in ("output", "worker")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {"machine": results.machine(), "device": device, "options": options}
    found["modes"] = {mode: measure(args, mode) for mode in args.modes}
    results.write_json(results.results_path(args.output), found)
    table = [
        [
            mode,
            side,
            f"{of['time'][side]['median_ms']:.0f} ms",
            f"{of['memory'][side]['peak_beyond'] / 2**20:.0f} MiB",
            f"{of['largest_error_of_a_sequence_nat'][side]:.2g} nat",
        ]
        for mode, of in found["modes"].items()
        for side in SIDES
    ]
    print(results.table(["head", "a step", "time", "peak memory", "log-prob error"], table))


if __name__ == "__main__":
    main()
