"""Run by test_sharded.py in each of several processes: training with FSDP2 on CPUs."""

from __future__ import annotations

from pathlib import Path

import fsdp_on_cpu
import tiny
from datasets import disable_progress_bars
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import TrainerCallback

ROWS = 12  # per optimiser step, in two micro-batches
CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "lora": {"peft_config": True},
    "bf16": {"bf16": True},
    # Gradients are sharded after each micro-batch, not whole until the last one.
    "synced": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
}


def trainer(path, name, **options):
    case = dict(CASES[name])
    tied = {"tie_word_embeddings": True} if case.pop("tie_word_embeddings", False) else {}
    if case.pop("peft_config", False):
        # The first steps of an adapter that starts at zero would show no difference.
        options["peft_config"] = tiny.lora(init_lora_weights=False)
    else:
        options["ref_model"] = tiny.model(seed=7)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return tiny.trainer(
        path, tiny.model(**tied), train=tiny.rows(30, seed=5), gradient_accumulation_steps=2,
        per_device_train_batch_size=ROWS // 2 // processes, max_steps=4, max_grad_norm=0.5,
        **case, **options,
    )  # fmt: skip


def figures(t):
    keys = ("loss", "grad_norm", "rewards/margins", "entropy")
    return [[line[key] for key in keys] for line in tiny.history(t)]


def weights(folder):
    """The weights that a folder holds, summed up: two numbers each."""
    file = next(f for f in sorted(Path(folder).glob("*.safetensors")))
    found = load_file(file)
    return {k: [float(v.float().sum()), float(v.float().norm())] for k, v in found.items()}


class Gathers:
    """Counts how often FSDP2 gathers the head's unit of the policy, and of the reference."""

    def __enter__(self):
        self.names, self._unshard = [], FSDPParamGroup.unshard
        names, unshard = self.names, self._unshard

        def counted(group, *args, **kwargs):
            if not group.is_unsharded and "lm_head" in (group._module_fqn or ""):
                names.append(group._module_fqn)
            return unshard(group, *args, **kwargs)

        FSDPParamGroup.unshard = counted
        return self

    def __exit__(self, *_):
        FSDPParamGroup.unshard = self._unshard


class Between(TrainerCallback):
    """Notes after micro-batches that are not a step's last whether gradients are whole."""

    def __init__(self):
        self.dtypes, self.whole = set(), set()

    def on_substep_end(self, args, state, control, model=None, **_):
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules()
                  if isinstance(m, FSDPModule)]  # fmt: skip
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            unsharded = getattr(parameter, "_unsharded_param", None)
            whole = None if unsharded is None else unsharded.grad
            for grad in (whole, parameter.sharded_param.grad):
                if grad is not None:
                    self.whole.add(grad is whole)
                    self.dtypes.add(str(grad.dtype))


def run(path, name, **options):
    t = trainer(path / name, name, **options)
    t.train()
    t.save_model(str(path / f"model {name}"))
    return t


def whole(path):
    """One process: the figures and weights of each case."""
    disable_progress_bars()
    found = {}
    for name in CASES:
        t = run(path, name, save_strategy="no")
        found[name] = figures(t), weights(path / f"model {name}")
    return found


def sharded(path, names):
    """The same of several processes; the first run leaves a checkpoint of its second step."""
    disable_progress_bars()
    fsdp_on_cpu.enable(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    path, found = Path(path), {}
    for i, name in enumerate(names):
        saves = {"save_strategy": "steps", "save_steps": 2} if i == 0 else {"save_strategy": "no"}
        between = Between()
        with Gathers() as gathers:
            t = run(path, name, callbacks=[between], **saves)
        models = [model for model in (t.model, t.ref_model) if model is not None]
        heads = [model.get_output_embeddings().weight for model in models]
        found[name] = {
            "figures": figures(t),
            "gathers": len(gathers.names),
            "whole gradients": [sorted(between.whole), sorted(between.dtypes)],
            "in parts": [hasattr(head, "placements") for head in heads],
        }
        dist.barrier()
        found[name]["weights"] = weights(path / f"model {name}")
    return found


def resumed(path, name):
    """A run that goes on from the second step, on another number of processes."""
    disable_progress_bars()
    fsdp_on_cpu.enable(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    t = trainer(Path(path) / name, name)
    t.train(resume_from_checkpoint=str(Path(path) / name / "out" / "checkpoint-2"))
    return figures(t)
