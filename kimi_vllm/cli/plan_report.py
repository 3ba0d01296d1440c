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
    used = (
        f", of which {plan.utilization:.0%} are used.\nPer device, {_gib(allowance(plan.memory))} GiB are reserved for "
        "activations and CUDA graphs (an estimate; the engine measures).\n"
    )
    starts = f"; below {least / 1e9:.1f} GB the engine does not start"
    if plan.cache_memory is not None:
        used, starts = ".\nNothing is estimated: --kv-cache-memory-bytes is what states and KV cache share.\n", ""
    console.print(
        f"{plan.model}: {num_parameters(plan.geometry):,} parameters on {devices} of {plan.memory / 1e9:.1f} GB "
        f"({_gib(plan.memory)} GiB){used}",
        markup=False,
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_row("weights", f"{_gib(plan.costs.weights)} GiB")
    facts.add_row("memory left", f"{_gib(plan.available)} GiB, shared by states and KV cache")
    facts.add_row("blocks", f"{plan.capacity.blocks:,} of {plan.costs.block:,} B, each {demand.block_size} tokens")
    filled = f"{plan.costs.state / 2**20:.2f} MiB, {plan.state_fill:.1%} of its blocks"
    facts.add_row("state", f"{plan.costs.state_blocks} blocks a request: {filled}")
    facts.add_row("tokens", f"{plan.capacity.tokens:,} in all blocks, if there were no states")
    console.print(facts)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("\ncontext", no_wrap=True)
    sizes, counts = ("ours\nGiB", "all-MLA\nGiB", "\nsaved", "in-tree\nGiB"), ("ours", "all-MLA", "in-tree")
    for title in (*sizes, *(f"at once\n{count}" for count in counts)):
        table.add_column(title, justify="right", no_wrap=True)
    for tokens in plan.contexts:
        row = plan.row(tokens)
        ours, all_mla, in_tree = row["bytes"].values()
        saved = f"{1 - ours / all_mla:.1%}"
        fit = (f"{count:,}" for count in row["concurrency"].values())
        table.add_row(_tokens(tokens), _gib(ours), _gib(all_mla), saved, _gib(in_tree), *fit)
    console.print(table)
    if plan.lengths:
        mixture = ", ".join(f"{share:.0%} of {_tokens(tokens)}" for tokens, share in plan.lengths.items())
        average = plan.average
        console.print(
            f"{mixture}: {average['ours']:,.1f} run at once on average, in-tree {average['in_tree']:,.1f}.\n",
            markup=False,
        )
    states = f", {plan.in_tree.states} states a request" if plan.speculative_tokens else ""
    console.print(
        "GiB: state and KV cache of one request. at once: requests that run, no more than --max-num-seqs "
        f"{demand.max_num_seqs:,}.\n"
        f"all-MLA: all {plan.geometry.num_layers} layers MLA, which is smaller below {plan.break_even:,} tokens. "
        f"in-tree: vLLM's own cache, whose blocks have {plan.in_tree.block_size:,} tokens here{states}.\n"
        f"Limits: a request beyond {demand.max_model_len:,} tokens is refused; more requests than fit wait, or are "
        f"preempted as others grow{starts}.",
        markup=False,
    )


def draw(plan: Plan, file: Path) -> None:
    """Plot concurrent requests over context length; the suffix chooses the format. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [plan.row(tokens) for tokens in plan.contexts]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("ours", "kimi-vllm"), ("in_tree", "in-tree"), ("all_mla", "all-MLA")):
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
