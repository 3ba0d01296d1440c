"""A `Plan` as text and as a picture."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kimi_vllm.cli.plan_data import Plan
from kimi_vllm.planning import allowance, memory_needed
from kimi_vllm.weight_bytes import num_parameters


def show(plan: Plan) -> None:
    """Print the plan as text."""
    console = Console(highlight=False, soft_wrap=True)
    demand, least = plan.demand, memory_needed(plan.costs, plan.demand, plan.utilization)
    devices = f"{plan.ranks} device" + "s" * (plan.ranks > 1)
    console.print(
        f"{plan.model}: {num_parameters(plan.geometry):,} parameters on {devices} of {plan.memory / 1e9:.1f} GB "
        f"({_gib(plan.memory)} GiB), of which {plan.utilization:.0%} are used.\n"
        f"Per device, {_gib(allowance(plan.memory))} GiB are reserved for activations and CUDA graphs (an estimate); "
        f"{_gib(plan.available)} GiB remain for state and KV cache.\n",
        markup=False,
    )
    console.print(plan.sizing.table(), markup=False)
    if plan.sizing.live < demand.max_num_seqs:
        console.print(
            f"  --max-num-seqs {demand.max_num_seqs} does not fit; the engine lowers it to {plan.sizing.live}."
        )
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("\ncontext", no_wrap=True)
    sizes, counts = ("ours\nGiB", "all-MLA\nGiB", "\nsaved", "in-tree\nGiB"), ("now", "at best", "all-MLA", "in-tree")
    for title in (*sizes, *(f"fit\n{count}" for count in counts)):
        table.add_column(title, justify="right", no_wrap=True)
    for tokens in plan.contexts:
        row = plan.row(tokens)
        ours, all_mla, in_tree = row["bytes"].values()
        saved = f"{1 - ours / all_mla:.1%}"
        fit = (f"{count:,}" for count in row["concurrency"].values())
        table.add_row(_tokens(tokens), _gib(ours), _gib(all_mla), saved, _gib(in_tree), *fit)
    console.print(table)
    console.print(
        "GiB: state and KV cache of one request. fit: concurrent requests, now: with memory divided as above; at best: "
        "with --max-num-seqs set to that number and no checkpoints.\n"
        f"all-MLA: all {plan.geometry.num_layers} layers MLA, which is smaller below {plan.break_even:,} tokens. "
        f"in-tree: vLLM's own cache, whose blocks have {plan.in_tree.block_size:,} tokens here.\n"
        f"Limits: a request beyond {plan.sizing.longest(1):,} tokens is refused; more requests than fit wait, or are "
        f"preempted as others grow; below {least / 1e9:.1f} GB the engine does not start.",
        markup=False,
    )


def draw(plan: Plan, file: Path) -> None:
    """Plot concurrent requests over context length; the suffix chooses the format. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [plan.row(tokens) for tokens in plan.contexts]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = ["kimi-vllm, at best", "kimi-vllm, now", "in-tree", "all-MLA"]
    for key, label in zip(("best", "as_started", "in_tree", "all_mla"), labels, strict=True):
        axes.plot(plan.contexts, [row["concurrency"][key] for row in rows], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="symlog",
        ylim=(0, None),
        xlabel="tokens per request",
        ylabel="requests at once",
        title=plan.model,
    )
    axes.set_xticks(plan.contexts, [f"{tokens:,}" for tokens in plan.contexts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f}" if count < 2**30 else f"{count / 2**30:.2f}"


def _tokens(count: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count:,}"
