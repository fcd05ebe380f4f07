"""benchmarks/rlhf.py: the true reward, the labels, what a policy is judged by, and each stage."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from lib import rlhf_task

    return rlhf_task


@pytest.fixture
def worker(task):
    from lib import rlhf_worker

    return rlhf_worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("start")
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_prompts_of_a_file_with_few_words(task, tmp_path):
    path = tmp_path / "pairs.jsonl"
    texts = ["Name three rivers", "Explain in great detail why winter mornings are cold", "Hi you"]
    rows = [{"prompt": chat(text), "chosen": [], "rejected": []} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = task.text_tasks(str(path), 1, 0, 0, most_words=5)
    assert [made.wanted for made in train] == [["rivers", "three"]] and held_out == []
    with pytest.raises(SystemExit, match="1 prompts of at most 5 words; 2 are needed"):
        task.text_tasks(str(path), 1, 1, 0, most_words=5)


def chat(text):
    return [{"role": "user", "content": text}]


def tasks_of(task, n):
    return [task.text_task(row["prompt"][0]["content"]) for row in tiny.rows(n, chat=True)]


def test_the_reward_of_the_demo_is_the_share_of_the_helpful_words(task):
    row = {
        "prompt": chat("How do I adopt a tree?"),
        "chosen": [
            {"role": "assistant", "content": "Gladly! Pick a tree. Water it. Have a pleasant day!"}
        ],
    }
    made = task.demo_task(row)
    assert made.wanted == ["a", "it", "pick", "tree", "water"]
    assert made.reward("Pick a tree. Water it.") == 1.0
    assert made.reward("PICK the tree") == pytest.approx(2 / 5)
    assert made.reward("") == 0.0
    limit = 10 + 8  # the helpful answer's words and the spare ones
    assert made.reward("pick " * (limit + 5)) == pytest.approx(1 / 5 - 0.02 * 5)


def test_the_reward_of_other_text_asks_for_the_words_of_the_prompt(task):
    made = task.text_task("Compare apples with pears")
    assert made.prompt == chat("Compare apples with pears")
    assert made.wanted == ["apples", "compare", "pears"]
    assert made.reward("Apples, pears and plums.") == pytest.approx(2 / 3)
    assert made.reward("pears " * 22) == pytest.approx(1 / 3 - 0.02 * 10)
    assert task.text_task(chat("one two three")).wanted == ["three"]


def test_the_demos_best_answers_are_its_chosen_ones(task):
    from fastpref.cli.demo import read_pairs

    rows = read_pairs("train.jsonl")[:60]
    tasks, _ = task.demo_tasks(60, 1)
    for row, made in zip(rows, tasks, strict=True):
        chosen, rejected = (made.reward(row[k][0]["content"]) for k in ("chosen", "rejected"))
        assert chosen == 1.0 and rejected < 1.0


def test_labels_are_bradley_terry_draws(task):
    draw = random.Random(0)
    for gap in (0.0, 0.25, -0.25):
        share = statistics.fmean(task.prefers_first(0.5 + gap, 0.5, draw) for _ in range(4000))
        assert share == pytest.approx(1 / (1 + math.exp(-task.SHARPNESS * gap)), abs=0.03)


@torch.no_grad()
def test_the_kl_is_the_summed_log_ratio_of_the_answers_tokens(task):
    """Against log-softmax in float64 of each answer alone, without padding."""
    start, policy, tokenizer = tiny.model(0).double(), tiny.model(1).double(), tiny.tokenizer()
    torch.manual_seed(3)
    made = task.sample(policy, tokenizer, tasks_of(task, 3), tokens=7, copies=2)
    assert len(made.texts) == 6
    found = task.answer_logps(policy, made, rows=4) - task.answer_logps(start, made, rows=4)
    for i, (ids, mask, answer) in enumerate(zip(*made[1:], strict=True)):
        row, length = ids[mask == 1], int(answer.sum())
        assert tokenizer.eos_token_id not in row[len(row) - length : -1]
        sums = [
            torch.log_softmax(m(input_ids=row[None]).logits[0, :-1], -1)
            .gather(1, row[1:, None])[-length:]
            .sum()
            for m in (policy, start)
        ]
        assert float(found[i]) == pytest.approx(float(sums[0] - sums[1]), abs=1e-4)
        assert made.texts[i] == tokenizer.decode(row[-length:], skip_special_tokens=True)


def test_the_starting_model_has_no_kl_to_itself(task):
    start = tiny.model()
    for policy, most in ((start, 0.0), (copy.deepcopy(start), 1e-4)):
        torch.manual_seed(0)
        found = task.judge(policy, start, tiny.tokenizer(), tasks_of(task, 3), tokens=5, copies=2)
        assert abs(found["kl"]) <= most
    assert found["reward"] <= 1.0 and 0.0 <= found["cut"] <= 1.0


def settings(task, folder, tmp_path, stage):
    tasks = tasks_of(task, 6)
    return {
        "stage": stage,
        "model": str(folder),
        "train": task.write_tasks(tmp_path / "train", tasks[:4]),
        "held_out": task.write_tasks(tmp_path / "held_out", tasks[4:]),
        "tokens": 6,
        "answers": 2,
        "batch": 2,
        "generations": 2,
        "learning_rates": dict.fromkeys(("dpo", "ipo", "rloo", "reward"), 1e-2),
    }


def test_each_stage_makes_one_step(task, worker, folder, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from lib import rlhf_report

    # Layers as small as these are not worth it otherwise.
    monkeypatch.setattr("fastpref.body.attach.LEAST_ELEMENTS", 1)
    choose = functools.partial(worker.choose_layers, speedup=lambda *shape: 2.0)
    monkeypatch.setattr(worker, "choose_layers", choose)
    judge = worker.Judge(settings(task, folder, tmp_path, "judge"))
    layers = [m for model in (judge.start, judge.policy) for m in model.modules()]
    layers = [m for m in layers if isinstance(m, torch.nn.Linear)]
    assert len(judge.products.layers) == len(layers) - 2  # the output heads
    pairs = judge.pairs({"seed": 0, "folder": str(tmp_path)})
    assert judge.count() > 0
    job = {"seed": 0, "steps": 1, "beta": 0.1, "keep_at": [1]}
    job |= {name: found["path"] for name, found in pairs.items()}
    job |= dict.fromkeys(("output", "reward_model"), str(tmp_path / "reward"))
    start = judge.judge({"path": None, "seed": 1})
    models = {"reward": 1, "rloo": 3, "dpo": 1}  # alive beside the judge's two
    runs, flops = [], {}
    for stage, alive in models.items():
        asked = settings(task, folder, tmp_path, stage)
        keep = {} if stage == "reward" else {"keep": str(tmp_path / stage)}
        run = worker.train(asked, job | keep)
        if keep:
            assert sum(run["models"].values()) == alive + 2
            (kept,) = run.pop("kept")
            judged = judge.judge({"path": kept["path"], "seed": 1})
            assert judged["kl"] != 0.0 and not Path(kept["path"]).exists()
            run["points"] = [{"step": kept["step"], **judged}]
        else:
            assert 0.0 <= run["accuracy"]["held_out_pairs"]["truth"] <= 1.0
        runs.append({"stage": stage, "steps": 1, "beta": 0.1, "seed": 0, **run})
        flops[stage] = worker.count(asked, job)
        assert flops[stage]["step"] > 0 and (flops[stage]["ahead"] > 0) == (stage == "dpo")
    assert all(type(layer) is torch.nn.Linear for layer in layers)
    found = {"runs": runs, "flops": flops, "start": [start], "compared": ""}
    rlhf_report.summarise(found)
    for key in ("seconds", "flops"):
        total = found["stage_costs"]["reward"][key] + found["stage_costs"]["rloo"][key]
        assert found["costs"]["rlhf"][key] == total
    assert {p["method"] for p in found["frontier"]} == {"rlhf", "dpo"}
    assert "reward model + RLOO" in rlhf_report.text(found)
    rlhf_report.plot(found, tmp_path / "rlhf.png")
    json.dumps(found)


def test_seeds_are_added_to_a_run_of_the_same_settings(task):
    import rlhf

    machine = {"cpu": "one", "threads": 2, "commit": "a", "date": "today"}
    settings = {"batch": 16, "seeds": 2, "budget": None, "betas": [0.1], "kl": "a note"}
    earlier = {"machine": machine, "model": "M", "settings": settings, "runs": [1], "pairs": [2]}
    more = {**earlier, "machine": {**machine, "date": "later"}, "runs": [], "pairs": []}
    more["settings"] = {**settings, "seeds": 3, "budget": 60.0, "betas": (0.1,), "kl": "reworded"}
    found = rlhf.resumed(json.loads(json.dumps(earlier)), more)
    assert found["runs"] == [1] and found["machine"]["date"] == "today"
    assert found["settings"] == {**settings, "seeds": 3, "budget": 60.0}
    for name, other in (
        ("model", {"model": "N"}),
        ("threads", {"machine": {**machine, "threads": 1}}),
        ("commit", {"machine": {**machine, "commit": "b"}}),
        ("batch", {"settings": {**settings, "batch": 8}}),
    ):
        with pytest.raises(SystemExit, match=f"--resume: the earlier run had another {name}$"):
            rlhf.resumed(earlier, {**more, **other})


def test_seeds_that_are_there_are_not_run_again(task, monkeypatch, tmp_path):
    import rlhf

    run = []

    def one_seed(seed, args, stages, folder, found):
        run.append(seed)
        found["pairs"].append({"seed": seed})

    monkeypatch.setattr(rlhf, "one_seed", one_seed)
    monkeypatch.setattr(rlhf.rlhf_report, "summarise", lambda found: None)
    path, found = tmp_path / "out.json", {"pairs": [{"seed": 1}], "wall_s": 50.0}
    rlhf.measure(rlhf.arguments(["--prompts", "2", "--held-out", "1"]), tmp_path, found, path)
    assert run == [0, 2] and found["wall_s"] >= 50.0
    assert json.loads(path.read_text())["pairs"] == [{"seed": n} for n in (1, 0, 2)]


def test_the_flops_of_a_product_and_of_attention_are_counted(worker):
    x, w = torch.randn(5, 7), torch.randn(7, 11)
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    counter = worker.FlopCounter()
    counter.start()
    x @ w
    counter.stop()
    assert counter.flops == 2 * 5 * 7 * 11
    counter = worker.FlopCounter()
    counter.start()
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    counter.stop()
    assert counter.flops == 2 * (2 * 2 * 6 * 6 * 4)
