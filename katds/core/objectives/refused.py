"""What other frameworks offer under a name, and why it does not exist here: for the message to someone who asks for it."""

from __future__ import annotations

_K1 = "the gradient of log p(y) - log q(y) at a sampled token averages to zero and says nothing about the KL"
_K3 = "its value estimates the reverse KL, but its gradient is that of the forward KL"
_ADVANTAGE = "a top-k KL is the same for every action, and such an advantage has an expected policy gradient of zero"
_TAIL = "a top-k sum without a bucket for the remaining mass is biased and shrinks the mass in the top k"
_MEAN = "a mean per micro-batch, rank or sequence depends on how rollouts were split; sums are divided by the global token count"
_MISSING = "a token without the teacher's score is an error, and never counts as a score of zero"

_SAMPLED = "Take objective.kind policy_gradient, which has that difference as its reward, or reverse_kl"
_ACTION = (
    "Take objective.kind policy_gradient, whose reward is the sampled token's, or reverse_kl, which is differentiated"
)
_BUCKET = "Take reverse_kl with support student_top_k, or forward_kl with teacher_top_k, which have the bucket"
_REMOVE = "Remove the setting"

# (setting, its values or None for any) -> why, remedy
_REFUSED: list[tuple[tuple[str, ...], tuple[str, ...] | None, str, str]] = [
    (("kind",), ("k1", "kl", "sampled_kl", "sampled_k1"), _K1, _SAMPLED),
    (("kind",), ("k3", "low_var_kl"), _K3, "Take objective.kind forward_kl, or policy_gradient for the reverse KL"),
    (("kind",), ("topk_advantage", "top_k_advantage", "topk_kl_advantage"), _ADVANTAGE, _ACTION),
    (("kind",), ("reverse_kl_topk", "forward_kl_topk", "topk_kl", "top_k_kl"), _TAIL, _BUCKET),
    (("support",), ("top_k", "topk", "top_k_no_tail", "top_k_without_tail", "student_top_k_no_tail"), _TAIL, _BUCKET),
    (("add_tail", "loss_add_tail", "tail", "tail_bucket", "zero_outside_topk"), None, _TAIL + "; here the bucket is always there", _REMOVE),
    (("use_policy_gradient",), None, _ADVANTAGE, _ACTION),
    (("loss_reduction", "reduction", "loss_agg_mode", "loss_aggregation"), None, _MEAN, _REMOVE),
    (("missing_scores", "missing_teacher", "ignore_missing"), None, _MISSING, _REMOVE),
]  # fmt: skip


def refusal(path: str, value: object) -> str | None:
    """The message about a recipe's setting that is wrong by principle: field, value, why, remedy. None for any other mistake."""
    section, _, name = path.rpartition(".")
    if section not in ("objective", "train"):
        return None
    for names, values, why, remedy in _REFUSED:
        if name in names and (values is None or value in values):
            return f"{path} is {value!r}, which is refused: {why}. {remedy}."
    return None
