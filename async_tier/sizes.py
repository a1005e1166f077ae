"""What a primary and a tier must hold, for a model whose KV has these sizes.

One set of rules, by which `async-tier doctor` and `async-tier size` judge a configuration, and a tier itself at start:

    primary   two steps, the one being computed and the last one, whose blocks are still being copied to the tier; and
              beside them the longest prompt that is to come back whole
    tier      at least twice the primary, and better eight times: a block that was just stored is in both. And a prompt
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from async_tier.text import format_size

OK, NOTE, WARNING, PROBLEM = LEVELS = ("ok", "note", "warning", "problem")
# Steps whose blocks are in the primary at a time.
STEPS = 2
# Tiers per primary. In a replay of traces a primary of half the tier cost 16 to 20 % of the hits, an eighth 5 %.
LEAST_RATIO, GOOD_RATIO = 2, 8


@dataclass(frozen=True)
class Finding:
    """level: one of LEVELS. says: one sentence. advice: what to do, of a warning or problem."""

    level: str
    name: str
    says: str
    advice: str = ""


@dataclass(frozen=True)
class KVSizes:
    """What a model's KV takes. block_bytes: a row of primary and tier, of all workers. tokens_per_block: by KV group.

    max_model_len, max_num_batched_tokens: vLLM's, in tokens. platform: who was asked, such as "vLLM 0.32.0 (cpu)".
    problem: why vLLM would serve wrong KV with these blocks per chunk, or None.
    """

    block_bytes: int
    tokens_per_block: tuple[int, ...]
    max_model_len: int
    max_num_batched_tokens: int
    platform: str = ""
    problem: str | None = None

    @property
    def token_bytes(self) -> float:
        """Bytes that each token takes, in all groups."""
        return self.block_bytes * sum(1 / tokens for tokens in self.tokens_per_block)

    @property
    def step_blocks(self) -> int:
        """The blocks of the steps that are in the primary at a time."""
        return STEPS * self.blocks(self.max_num_batched_tokens)

    def blocks(self, tokens: int) -> int:
        """The number of blocks that so many consecutive tokens take."""
        return sum(-(-tokens // per_block) for per_block in self.tokens_per_block)

    def tokens(self, size: int) -> int:
        """How many tokens fit in so many bytes."""
        return int(size // self.block_bytes / sum(1 / tokens for tokens in self.tokens_per_block))

    def prompt_tokens(self, primary: int) -> int:
        """The longest prompt that a primary of so many bytes holds beside the steps, at most max_model_len."""
        room = primary - self.step_blocks * self.block_bytes
        return max(0, min(self.max_model_len, self.tokens(room)))


def judge_primary(primary: int, sizes: KVSizes) -> Finding:
    """What is wrong with a primary of so many bytes, the worst first; or that it holds what it must."""
    rows, step = primary // sizes.block_bytes, f"max_num_batched_tokens={sizes.max_num_batched_tokens}"
    held, most = sizes.prompt_tokens(primary), sizes.max_model_len
    for blocks, level, what, follows, instead in (
        (sizes.blocks(1), PROBLEM, "one token", "vLLM stores nothing", ""),
        (sizes.step_blocks // STEPS, PROBLEM, f"one step of {step}", "vLLM stores nothing of such a step", step),
        (
            sizes.step_blocks,
            WARNING,
            f"{STEPS} steps of {step}",
            "vLLM gives up stores when steps follow closely",
            step,
        ),
        (
            sizes.step_blocks + sizes.blocks(most),
            WARNING,
            f"{STEPS} steps of {step} and beside them a prompt of max_model_len={most}",
            f"beside others, of a prompt of more than {held} tokens only the start may come back",
            "max_model_len",
        ),
    ):
        if blocks > rows:
            least = blocks * sizes.block_bytes
            return Finding(
                level,
                "primary",
                f"the primary holds {rows} blocks of {format_size(sizes.block_bytes)} "
                f"({sizes.tokens(primary)} tokens), but {what} would take {blocks}: {follows}",
                f"set cpu_bytes_to_use to at least {least} ({format_size(least)})"
                + (f", or {instead.partition('=')[0]} to less" if instead else ""),
            )
    says = f"the primary holds {STEPS} steps of {step}, and beside them a prompt of max_model_len={most}"
    return Finding(OK, "primary", says)


def judge_tier(primary: int, tier: int, sizes: KVSizes | None) -> Iterator[Finding]:
    """The same for a tier of so many bytes; without `sizes`, only beside the primary."""
    says = f"the tier has {format_size(tier)}, the primary {format_size(primary)}"
    advice = f"set bytes_to_use to {GOOD_RATIO} times cpu_bytes_to_use, if memory allows"
    if tier < LEAST_RATIO * primary:
        advice = f"set bytes_to_use to at least {LEAST_RATIO} times cpu_bytes_to_use, and better to {GOOD_RATIO} times"
    if tier <= primary:
        says += "; vLLM keeps each block in both, so nearly all that the tier holds is in the primary, too"
        yield Finding(PROBLEM, "sizes", says, advice)
    elif tier < GOOD_RATIO * primary:
        says += f"; each block is in both at first, so a primary of {primary / tier:.0%} of the tier costs hits: "
        says += "a fifth at 50%, a twentieth at 12%"
        yield Finding(NOTE if tier >= LEAST_RATIO * primary else WARNING, "sizes", says, advice)
    else:
        yield Finding(OK, "sizes", says)
    if sizes is None:
        return
    says = f"the tier holds {sizes.tokens(tier)} tokens of this model, "
    if tier // sizes.block_bytes < sizes.blocks(sizes.max_model_len):
        says += f"which is less than one prompt of max_model_len={sizes.max_model_len}"
        yield Finding(WARNING, "tier", says, "set bytes_to_use to more, or max_model_len to less")
    else:
        says += f"or {sizes.tokens(tier) // sizes.max_model_len} prompts of max_model_len={sizes.max_model_len}"
        advice = (
            "if more than that is stored between two questions of a user, the tier evicts what is asked for next: "
            "see Loads per evicted block in docs/monitoring"
        )
        yield Finding(OK, "tier", says, advice)
