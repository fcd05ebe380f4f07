"""What rlhf.py found: costs, ratios, the frontier, the table and the plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import results

NAMES = {"rlhf": "reward model + RLOO", "dpo": "DPO", "ipo": "IPO"}
STAGES = {"rlhf": ("reward", "rloo"), "dpo": ("dpo",), "ipo": ("ipo",)}
METHODS = {"rloo": "rlhf", "dpo": "dpo", "ipo": "ipo"}  # the stage that makes the policy
COSTS = {
    "seconds": "wall time",
    "cpu_s": "CPU time",
    "flops": "FLOPs",
    "above_bytes": "peak memory beyond the libraries",
    "peak_bytes": "peak memory",
    "models": "models alive at once",
}


def stage_costs(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What one run of each stage costs: median times, counted FLOPs, the first run's memory."""
    out: dict[str, dict[str, float]] = {}
    for stage in ("reward", "rloo", "dpo", "ipo"):
        runs = [run for run in found["runs"] if run["stage"] == stage]
        if not runs:
            continue
        flops, first = found["flops"][stage], runs[0]
        out[stage] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "cpu_s": statistics.median(run["cpu_s"] for run in runs),
            "flops": flops["step"] * first["steps"] + flops["ahead"],
            "peak_bytes": first["peak_bytes"],
            "above_bytes": first["peak_bytes"] - first["libraries_bytes"],
            "models": sum(first["models"].values()),
        }
    return out


def method_costs(stages: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What a policy costs from the pairs on. Times and FLOPs of stages add up; the memory is that
    of the largest stage."""
    out = {}
    for method, parts in STAGES.items():
        if not all(part in stages for part in parts):
            continue
        out[method] = {
            key: (max if key in ("peak_bytes", "above_bytes", "models") else sum)(
                stages[part][key] for part in parts
            )
            for key in COSTS
        }
    return out


def ratios(costs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        f"rlhf / {other}": {
            key: round(costs["rlhf"][key] / max(costs[other][key], 1e-9), 3) for key in COSTS
        }
        for other in ("dpo", "ipo")
        if other in costs and "rlhf" in costs
    }


def frontier(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point for each method, beta and step: means over the seeds. reward_sd is the seeds'
    standard deviation, kl_se the standard error that sampling answers leaves in the mean KL."""
    cells: dict[tuple[str, float, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["stage"] in METHODS:
            for point in run["points"]:
                cells[METHODS[run["stage"]], run["beta"], point["step"]].append(point)
    out = []
    for (method, beta, step), points in cells.items():
        rewards = [point["reward"] for point in points]
        out.append(
            {
                "method": method,
                "beta": beta,
                "step": step,
                "seeds": len(points),
                "reward": statistics.fmean(rewards),
                "reward_sd": statistics.stdev(rewards) if len(rewards) > 1 else None,
                "kl": statistics.fmean(point["kl"] for point in points),
                "kl_se": sum(point["kl_se"] ** 2 for point in points) ** 0.5 / len(points),
                "words": statistics.fmean(point["words"] for point in points),
            }
        )
    return out


def best(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The point of each method with the highest held-out true reward. Chosen on the same prompts
    that judge it, for all methods alike."""
    return {
        method: max(mine, key=lambda point: point["reward"])
        for method in NAMES
        if (mine := [point for point in points if point["method"] == method])
    }


def summarise(found: dict[str, Any]) -> None:
    """Add what follows from the runs."""
    found["stage_costs"] = stage_costs(found)
    found["costs"] = method_costs(found["stage_costs"])
    found["ratios"] = ratios(found["costs"])
    found["frontier"] = frontier(found["runs"])
    found["best"] = best(found["frontier"])


def cost_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of costs; a column for each method, and RLHF / DPO."""
    costs = found["costs"]
    shown = {
        "seconds": lambda x: f"{x:.1f} s",
        "cpu_s": lambda x: f"{x:.1f} s",
        "flops": lambda x: f"{x / 1e9:.0f} GFLOP",
        "above_bytes": lambda x: f"{x / 2**20:.0f} MiB",
        "peak_bytes": lambda x: f"{x / 2**20:.0f} MiB",
        "models": lambda x: f"{x:.0f}",
    }
    against = found["ratios"].get("rlhf / dpo", {})
    rows = [
        [
            title,
            *(shown[key](costs[m][key]) for m in costs),
            f"{against[key]:.1f}x" if against else "-",
        ]
        for key, title in COSTS.items()
    ]
    for key, spread, title in (
        ("reward", "reward_sd", "best held-out true reward"),
        ("kl", "kl_se", "its KL, nats"),
    ):
        rows.append([title, *(_number(found["best"][m], key, spread) for m in costs), ""])
    return ["", *(NAMES[m] for m in costs), "RLHF / DPO"], rows


def _number(point: dict[str, Any], key: str, spread: str) -> str:
    return f"{point[key]:.2f}" + (f" ± {point[spread]:.2f}" if point[spread] is not None else "")


def text(found: dict[str, Any]) -> str:
    points = [
        [
            NAMES[p["method"]],
            f"{p['beta']:g}",
            str(p["step"]),
            f"{p['reward']:.3f}",
            f"{p['kl']:.2f}",
            f"{p['kl_se']:.2f}",
            f"{p['words']:.0f}",
            str(p["seeds"]),
        ]
        for p in found["frontier"]
    ]
    header = ["method", "beta", "step", "true reward", "KL", "±", "words", "seeds"]
    start = statistics.fmean(p["reward"] for p in found["start"])
    accuracy = [
        run["accuracy"]["held_out_pairs"] for run in found["runs"] if run["stage"] == "reward"
    ]
    starting = f"starting model: true reward {start:.3f}."
    if accuracy:
        said = ", ".join(f"{a['truth']:.2f}" for a in accuracy)
        starting += (
            " The reward model finds the truly better held-out answer in a share of "
            f"{said} (a seed each)."
        )
    return "\n\n".join(
        [
            results.table(header, points),
            starting,
            results.table(*cost_rows(found)),
            found["compared"],
        ]
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """The frontier of reward against KL, and bars of time, FLOPs and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1])
    axis = left.subplots()
    colours = {method: f"C{i}" for i, method in enumerate(NAMES)}
    start = statistics.fmean(p["reward"] for p in found["start"])
    for method, colour in colours.items():
        mine = [point for point in found["frontier"] if point["method"] == method]
        betas = sorted({point["beta"] for point in mine})
        for mark, beta in zip("osD^v<>P", betas, strict=False):
            line = [p for p in mine if p["beta"] == beta]
            kl, reward = ([p[key] for p in line] for key in ("kl", "reward"))
            axis.plot([0, *kl], [start, *reward], color=colour, alpha=0.35, linewidth=1)
            axis.errorbar(
                kl,
                reward,
                [p["reward_sd"] or 0 for p in line],
                [p["kl_se"] for p in line],
                fmt=mark,
                color=colour,
                elinewidth=0.7,
                label=f"{NAMES[method]}, beta {beta:g}",
            )
    axis.plot([0], [start], "k*", markersize=12, label="starting model")
    axis.set_xlabel("KL to the starting model, nats an answer")
    axis.set_ylabel("true reward of answers to held-out prompts")
    axis.set_title("Reward against KL; bars: the seeds' spread, and the error of the KL", size=10)
    axis.legend(fontsize=8, loc="lower right")
    bars = right.subplots(4, 1)
    stages, costs = found["stage_costs"], found["costs"]
    panels = (
        (bars[0], "seconds", 1.0, "wall time of one policy, s"),
        (bars[1], "cpu_s", 1.0, "CPU time of one policy, s"),
        (bars[2], "flops", 1e9, "GFLOP of one policy"),
        (bars[3], "above_bytes", 2**20, "peak memory beyond the libraries, MiB"),
    )
    for axis, key, unit, title in panels:
        for i, method in enumerate(costs):
            total = costs[method][key] / unit
            axis.barh(i, total, color=colours[method])
            if method == "rlhf" and key != "above_bytes":  # stages add up
                axis.barh(i, stages["reward"][key] / unit, color="C7")
            axis.annotate(f" {total:.3g}", (total, i), va="center", fontsize=9)
        axis.set_yticks(range(len(costs)), [NAMES[m] for m in costs], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"{title}; grey: reward model" if axis is bars[0] else title, size=10)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
