"""What a step makes and lets go of: caches and forwards of the rollouts, activations and loss of the learning, on the fullest rank."""

from __future__ import annotations

from katds.core.types import Need
from katds.models.tiled_head import CUDA_TILE_ELEMENTS
from katds.plan.held import count, gather_buffer, teacher_name
from katds.plan.items import LEARN, ROLLOUT, STEP, Memory, number
from katds.plan.job import Job
from katds.plan.models import ModelShape
from katds.plan.signal import TOKEN_BYTES
from katds.plan.trace import Update, trace_forward, trace_score, trace_update
from katds.plan.zero import gathered, gathers, persistent, sub_groups
from katds.rollout.prefill import PREFILL_TOKENS

NATIVE_TILE = 256  # rows of the C code's products


def rollouts(found: Memory, job: Job) -> None:
    """Adds what the rollout phase needs to `found`."""
    rollout, shape, slots = job.recipe.rollout, job.student, job.slots
    _caches(found, job)
    beside = ("decode", "score") if rollout.overlap else ("decode",)
    models = (shape, job.teachers[0].shape) if job.guided else (shape,)
    logits = sum(slots * m.vocabulary * (m.width + 4) for m in models) + 4 * slots * 4 * shape.vocabulary
    how = f"{slots} slots x {shape.vocabulary} words, some 6 copies"
    found.add("student: logits and sampling", how, logits, beside)
    prompts = -(-slots // rollout.samples_per_prompt) * job.prompts.longest
    if job.prefixes:  # each makes its prompt one of its own
        prompts = slots * (job.prompts.longest + max(job.prefixes))
    part = min(prompts, PREFILL_TOKENS)
    found.add("student: reading prompts", f"a forward of {part} tokens", _reading(job, shape, part, True), beside)
    chunk = round(slots * rollout.chunk_tokens * job.reading)
    for teacher in job.teachers:
        # Only a teacher that a rank has for itself reads many prompts in several forwards; what is left of them comes with a chunk.
        whole = teacher.gather != "layer"
        tokens = chunk + (part if whole else prompts)
        size = max(_reading(job, teacher.shape, tokens, whole), _scoring(job, teacher.shape, chunk))
        if job.signal.by_teacher:  # the student's head, at the same tokens
            size = max(size, _scoring(job, shape, chunk))
        how = f"a forward of {tokens} tokens, {chunk} scored"
        found.add(f"{teacher_name(job, teacher)}: reading", how, size, ("score",))
    if job.signal.by_teacher:
        flights = 2 if rollout.overlap else 1
        kept = flights * slots * rollout.chunk_tokens * shape.hidden * shape.width
        how = f"{flights} x {slots} slots x {rollout.chunk_tokens} tokens x {shape.hidden}"
        found.add("student: hidden states", how, kept, ("decode", "score"))
    row = job.signal.bytes
    log = job.decoded_rows * row
    found.add("signal of the step", f"{job.decoded_rows} scored tokens x {row} B", log, ROLLOUT)
    size = job.kept_rows * row + log // 2
    found.add("signal being collected", "once more, as far as it is kept", size, ("collect",))


def _caches(found: Memory, job: Job) -> None:
    slots, length = job.slots, job.cache_length
    both = ("decode", "score")
    size = job.student.key_bytes
    how = f"{slots} slots x {length} positions x {number(size)} B (2 x layers x key heads x head size)"
    at = STEP if job.recipe.rollout.weights == "copy" else both
    found.add("student: key/value cache", how, slots * length * size, at)
    for teacher in job.teachers:
        size, own = teacher.shape.key_bytes, round(length * job.reading)
        how = f"{slots} slots x {own} positions x {number(size)} B"
        found.add(f"{teacher_name(job, teacher)}: key/value cache", how, slots * own * size, both)


def learning(found: Memory, job: Job) -> None:
    """Adds what the updates need to `found`."""
    tokens, minibatches = job.micro_batch_tokens, job.recipe.train.minibatches
    row = job.signal.learnt_bytes + TOKEN_BYTES
    found.add("signal of the kept tokens", f"{job.kept_rows} tokens x {row} B", job.kept_rows * row, LEARN)
    found.add("signal dealt to the learner", f"1 / {minibatches} of it", job.kept_rows * row // minibatches, LEARN)
    _gathered_layers(found, job)
    update, both = _update(job, tokens), ("loss", "backward")
    how = "each layer's input and one layer" if job.recipe.train.activation_checkpointing else "what the forward leaves"
    how = f"{how}, {tokens} packed tokens ({number(update.kept / tokens)} B each)"
    found.add("activations", how, update.kept, both)
    found.add("loss", "tiles, and the head's gradient in fp32", update.loss - update.kept, ("loss",))
    size = update.backward - update.kept
    found.add("gradients of a layer", "what the backward makes on its way", size, ("backward",))
    _reduction(found, job)


def _gathered_layers(found: Memory, job: Job) -> None:
    shape, zero, ranks, both = job.student, job.zero, job.ranks, ("loss", "backward")
    active = gathers(job.update_order, zero, ranks).most * shape.width
    how = "as many as DeepSpeed keeps between forward and backward"
    found.add("student: gathered layers", how, active, both)
    if active < (gathered(shape.sizes, ranks, zero.away) - persistent(shape, zero, ranks)) * shape.width:
        buffer = gather_buffer(shape, zero, ranks)
        found.add("student: gather buffer", "stage3_prefetch_bucket_size", buffer, both)


def _reduction(found: Memory, job: Job) -> None:
    shape, zero, ranks = job.student, job.zero, job.ranks
    size = max(min(zero.bucket, shape.parameters), max(shape.sizes) if ranks > 1 else 0) * zero.communication.itemsize
    # gloo reduces a copy of its own.
    copies, why = (2, ", and gloo's") if job.device == "cpu" and ranks > 1 else (1, "")
    early = ("backward", "reduce") if shape.parameters > zero.bucket else ("reduce",)
    found.add("reduction", f"a copy of the bucket in rank order{why}", copies * size, early)
    if zero.optimizer_on == "device":
        part = max(sub_groups(shape.sizes, ranks, zero.sub_group))
        how = f"4 B x {count(shape)} / {ranks}: the gradients, flat"
        found.add("optimizer step", how, 4 * part, ("optimizer",))


def _update(job: Job, tokens: int) -> Update:
    elements = CUDA_TILE_ELEMENTS if job.device == "cuda" else None
    teacher = job.teachers[0].shape.hidden if Need.FULL in job.signal.needs else None
    checkpointing = job.recipe.train.activation_checkpointing
    return trace_update(job.student, tokens, checkpointing, job.signal.tile(), elements, teacher)


def _reading(job: Job, shape: ModelShape, tokens: int, lent: bool) -> int:
    """`lent`: the model lies whole on the rank, where C code may read."""
    if not (job.in_c and lent):
        return trace_forward(shape, tokens)
    rows = 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.hidden
    return 4 * (tokens * rows + min(tokens, NATIVE_TILE) * (shape.hidden + 2 * shape.inner))


def _scoring(job: Job, shape: ModelShape, tokens: int) -> int:
    signal = job.signal
    compared = {Need.TEACHER_TOP_K if signal.by_teacher else Need.STUDENT_TOP_K}
    asked = signal.needs | compared if job.divergence else signal.needs
    needs = asked - {Need.FULL, Need.WRITTEN, Need.STUDENT_ENTROPY}
    elements = CUDA_TILE_ELEMENTS if job.device == "cuda" else None
    return trace_score(shape, tokens, needs, signal.top_k or 1, signal.teacher_top_k, elements) if needs else 0
