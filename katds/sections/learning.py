"""How the student writes and learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from katds.settings import Count, Moment, Nucleus, Positive, Rate, Scale, Section, Share


class RolloutConfig(Section):
    """How the student writes."""

    prompts_per_step: Positive = Field(128, description="prompts of one step, over all ranks")
    samples_per_prompt: Positive = Field(1, description="rollouts per prompt; the prompt is prefilled once")
    max_new_tokens: Positive = Field(4096, description="longest response")
    end_tokens: list[str] = Field(
        default_factory=list,
        description="tokens that end a response besides the student's own: a base model that is prompted through a chat template "
        "does not know the template's, e.g. [<|im_end|>]",
    )
    slots: Positive = Field(32, description="rollouts that a rank writes at the same time")
    chunk_tokens: Positive = Field(
        64, description="tokens decoded between two looks of the teacher: more costs fewer gathers, fewer stops sooner"
    )
    temperature: Scale = Field(1.0, description="0 decodes greedily")
    top_p: Nucleus = Field(0.95, description="nucleus sampling; 1 turns it off")
    top_k: Count = Field(0, description="sample among the k most probable tokens; 0 turns it off")
    min_p: Share = Field(0.0, description="drop tokens below min_p x the largest probability; 0 turns it off")
    audit_fraction: Share = Field(
        1 / 16, description="share of rollouts that no rule ends; savings and false terminations are measured on them"
    )
    divergence_top_k: Positive = Field(
        64,
        description="most probable tokens, on which the per-token reverse KL is computed; the rest is one tail bucket",
    )
    weights: Literal["view", "copy"] = Field(
        "view",
        description="what the student decodes from. view: its gathered shards, lent for the phase; no memory afterwards. "
        "copy: an inference copy, refreshed after each update; it stays in place, so that CUDA graphs and the key cache outlive "
        "the phase, and costs every rank the weights once more",
    )
    overlap: bool = Field(
        False,
        description="on a GPU, write the next chunk while the teacher reads the last one, on a second stream; every rollout then "
        "writes one chunk in vain",
    )
    fast_decode: bool = Field(
        True,
        description="leave operator calls out where possible: C code on the CPU, CUDA graphs on a GPU; false: the model's "
        "own forward",
    )


class RewardConfig(Section):
    """A task reward on top of the objective, as an advantage of every sampled token (leave-one-out baseline)."""

    weight: Scale = Field(
        0.0,
        description="of the reward's policy gradient beside the objective; 0: no reward. Only rollouts that end by themselves are "
        "rewarded: a rule that ends many (stop.kind) leaves the reward few, and those the short ones",
    )
    function: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = Field(
        None,
        description="module:function of (prompt, response, answer or null) -> number; null: 1 where evaluation.grader finds the "
        "response right, else 0. Rollouts that a rule has ended have no reward",
    )

    def check(self, filtered: bool, blended: bool, answered: bool) -> None:
        """Raises ValueError where the reward's gradient would be wrong, or there is nothing to grade."""
        if self.weight == 0.0:
            return
        if blended:
            raise ValueError(
                f"reward.weight is {self.weight:g}, but behaviour.kind lets another distribution write, so that the clip of the reward's "
                "ratio would bias its gradient; set behaviour.kind to student, or reward.weight to 0"
            )
        if filtered:
            raise ValueError(
                f"reward.weight is {self.weight:g}, but its gradient is biased where rollouts are not drawn from the whole "
                "distribution; set rollout.top_p to 1, top_k and min_p to 0 and temperature above 0"
            )
        if self.function is None and not answered:
            raise ValueError(
                f"reward.weight is {self.weight:g}, but data.answer_column is null: there is nothing to grade; name the column, or "
                "give reward.function"
            )


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: Rate = Field(1e-6, description="peak learning rate")
    warmup_fraction: Share = Field(0.03, description="share of the optimizer steps with rising rate")
    final_lr_fraction: Share = Field(0.0, description="rate at the end of the cosine, relative to the peak")
    weight_decay: Scale = Field(0.0, description="decoupled weight decay")
    betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="decay of the two moments")
    eps: Rate = Field(1e-8, description="added to the root of the second moment")
    gradient_clip: Rate | None = Field(1.0, description="global gradient norm; null turns it off")


class TrainConfig(Section):
    """How the student learns."""

    steps: Positive | None = Field(None, description="steps to train; default: as many as `epochs` need")
    epochs: Rate = Field(3.0, description="passes over the prompts, where steps is not given")
    minibatches: Positive = Field(
        1, description="optimizer steps per rollout step; rollouts are dealt to them by id (the paper's is inferred: 4)"
    )
    micro_batch_tokens: Positive = Field(16384, description="tokens of one packed forward on one rank")
    sequence_parallel: Positive = Field(
        1,
        description="so many neighbouring ranks share each packed forward, of so many times micro_batch_tokens (Ulysses): for "
        "rollouts that one rank has no memory to learn from. It divides the ranks and the student's heads",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more time"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
