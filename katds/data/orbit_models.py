"""The demo's two models on the task `orbit`: a good teacher and a bad student, trained and measured on the CPU.

The teacher computes right products after any prefix. The student knows everything but a share of the products that
problems use; there it believes in wrong ones, which lead it onto orbits that never end.

PyTorch and transformers take seconds to load: they are imported inside functions, so that a program can answer its
user before it needs them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from katds.data import orbit
from katds.data.spelling import IGNORED, Row, Spelling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PEAK_RATES = {"matrices": 0.02, "rest": 0.01}  # of Muon and AdamW
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 50
EARLY, LATE = slice(0, 32), slice(150, None)  # tokens of a rollout, to compare the divergence at


@dataclass(frozen=True)
class School:
    """A model's size, and how many tokens of which traces it is trained on."""

    hidden_size: int
    intermediate_size: int
    head_dim: int
    tie_word_embeddings: bool
    train_tokens: int
    batch_tokens: int = 1024
    slip_rate: float = 0.2
    short_steps: int = 14
    long_steps: int = 60  # enough for rollouts of 320 tokens


@dataclass(frozen=True)
class Settings:
    """All that the result depends on."""

    seed: int
    quick: bool
    teacher: School
    student: School
    eval_problems: int = 128
    samples: int = 4
    student_tokens: int = 320
    teacher_tokens: int = 512
    wrong_share: float = 1 / 3
    wrong_rate: float = 0.9


def settings_for(seed: int, quick: bool) -> Settings:
    """The demo's pair, or with `quick` one that has hardly been trained."""
    tokens = 4_000 if quick else 600_000
    teacher = School(96, 512, head_dim=32, tie_word_embeddings=False, train_tokens=tokens)
    student = School(64, 256, head_dim=16, tie_word_embeddings=True, train_tokens=tokens)
    if quick:
        return Settings(seed, quick, teacher, student, samples=1, student_tokens=32, teacher_tokens=32)
    return Settings(seed, quick, teacher, student)


def teacher_traces(settings: Settings) -> Iterator[tuple[orbit.Problem, orbit.Trace]]:
    """Clean traces of all problems, and off-path ones from anywhere."""
    school, rng = settings.teacher, random.Random(f"teacher {settings.seed}")
    while True:
        for steps in (school.long_steps, *[school.short_steps] * 3):
            problem = rng.choice(orbit.all_problems())
            words = orbit.clean_trace(problem)
            yield problem, orbit.Trace(words, words)
            problem = orbit.any_problem(rng)
            yield problem, orbit.off_path_trace(problem, rng, school.slip_rate, steps)


def student_traces(settings: Settings) -> Iterator[tuple[orbit.Problem, orbit.Trace]]:
    """Noisy traces of training problems, and from anywhere."""
    school, rng = settings.student, random.Random(f"student {settings.seed}")
    wrong = orbit.misconceptions(settings.seed, settings.wrong_share)
    train, _ = orbit.split_problems(settings.seed, settings.eval_problems)
    while True:
        for index in range(8):
            problem = rng.choice(train) if index % 4 == 1 else orbit.any_problem(rng)
            steps = school.long_steps if index == 0 else school.short_steps
            yield problem, orbit.noisy_trace(problem, rng, wrong, settings.wrong_rate, school.slip_rate, steps)


def training_batches(settings: Settings, role: str, tokenizer: PreTrainedTokenizerFast) -> list[list[Row]]:
    """`train_tokens` words in batches of about `batch_tokens`; rows of like length together, so that little is padded."""
    school: School = getattr(settings, role)
    spelling = Spelling(tokenizer)
    rows: list[tuple[int, Row]] = []
    missing = school.train_tokens
    for problem, trace in (teacher_traces if role == "teacher" else student_traces)(settings):
        if missing <= 0:
            break
        words = len(orbit.prompt_words(problem)) + len(trace.words)
        rows.append((words, spelling.row(problem, trace)))
        missing -= words
    batches: list[list[Row]] = [[]]
    for words, row in sorted(rows, key=lambda row: row[0]):
        if (len(batches[-1]) + 1) * words > school.batch_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    random.Random(f"{role} order {settings.seed}").shuffle(batches)
    return batches


def build_model(school: School, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained fp32 Qwen3 of two layers for this tokenizer: few layers decode fastest."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=school.hidden_size,
        intermediate_size=school.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=school.head_dim,
        max_position_embeddings=orbit.MAX_TOKENS,
        tie_word_embeddings=school.tie_word_embeddings,
        initializer_range=0.1,  # matrices this narrow learn slowly from the usual 0.02
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def make_optimizers(model: Qwen3ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside layers (it memorises products in half of AdamW's steps), AdamW for the rest."""
    import torch

    from katds.data.muon import Muon

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        (Muon(matrices, PEAK_RATES["matrices"], WEIGHT_DECAY, momentum=0.95), PEAK_RATES["matrices"]),
        (torch.optim.AdamW(rest, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True), PEAK_RATES["rest"]),
    ]


def train_model(settings: Settings, role: str, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> int:
    """Trains a teacher or a student, in the demo's words or another tokenizer's tokens, and writes its folder. Returns its number of
    parameters."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    tokenizer = tokenizer or orbit.build_tokenizer()
    torch.manual_seed(2 * settings.seed + (role == "teacher"))
    model = build_model(getattr(settings, role), tokenizer)
    optimizers = make_optimizers(model)
    batches = training_batches(settings, role, tokenizer)
    bar = tqdm(batches, role, position=int(role == "student"), unit="step", mininterval=0.5, disable=None)
    for step, batch in enumerate(bar):
        # Padding on the right needs no mask: causal attention never reads it, and the loss ignores it.
        ids_ST = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
        targets_ST = pad_sequence([torch.tensor(targets) for _, targets in batch], True, IGNORED)
        logits_STV = model(input_ids=ids_ST, use_cache=False).logits
        loss = cross_entropy(logits_STV[:, :-1].flatten(0, 1), targets_ST[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        schedule = min(1.0, (step + 1) / WARMUP_STEPS) * (0.51 + 0.49 * math.cos(math.pi * step / len(batches)))
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule
            optimizer.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def load_model(folder: Path) -> Qwen3ForCausalLM:
    """A trained model, ready to be measured."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder).eval()


def sample(model: Qwen3ForCausalLM, problems: list[orbit.Problem], limit: int, seed: int) -> list[list[int]]:
    """One response per problem at temperature 1. All prompts have the same length: no padding."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    responses: list[list[int]] = [[] for _ in problems]
    alive = list(range(len(problems)))
    ids_ST = torch.tensor([orbit.encode(orbit.prompt_words(problem)) for problem in problems])
    past = None
    with torch.inference_mode():
        for _ in range(limit):
            output = model(input_ids=ids_ST, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            ids_ST = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
            for row, token in zip(alive, ids_ST[:, 0].tolist(), strict=True):
                responses[row].append(token)
            going = (ids_ST[:, 0] != orbit.WORD_ID[orbit.EOS]).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(alive):
                past.batch_select_indices(going)
                ids_ST, alive = ids_ST[going], [alive[index] for index in going.tolist()]
    return responses


def accuracy(problems: list[orbit.Problem], responses: list[list[int]]) -> float:
    """Share of responses that end in the right answer."""
    texts = [" ".join(orbit.WORDS[token] for token in response) for response in responses]
    pairs = zip(problems, texts, strict=True)
    return sum(orbit.answer_of(text) == problem.answer for problem, text in pairs) / len(problems)


def measure_teacher(settings: Settings, out: Path) -> dict[str, float | None]:
    """Accuracy on the evaluation problems, and of next products after prefixes with slips."""
    import torch

    model = load_model(out / "teacher")
    problems = orbit.split_problems(settings.seed, settings.eval_problems)[1] * settings.samples
    right = accuracy(problems, sample(model, problems, settings.teacher_tokens, settings.seed))
    rng = random.Random(f"off path {settings.seed}")
    hits: list[bool] = []
    for problem in problems[:64]:
        trace = orbit.off_path_trace(problem, rng, settings.teacher.slip_rate, settings.teacher.long_steps)
        prompt = orbit.prompt_words(problem)
        with torch.inference_mode():
            logits_TV = model(torch.tensor([orbit.encode((*prompt, *trace.words))])).logits[0]
        written = logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist()
        places = range(orbit.STEP_TOKENS - 2, len(trace.words), orbit.STEP_TOKENS)
        hits += [orbit.WORDS[written[place]] == trace.targets[place] for place in places]
    return {"teacher_accuracy": right, "teacher_off_path_accuracy": sum(hits) / len(hits)}


def measure_student(settings: Settings, out: Path) -> dict[str, float | None]:
    """Accuracy, share of rollouts without an end, and reverse KL per token early and late in those."""
    import torch

    student, teacher = load_model(out / "student"), load_model(out / "teacher")
    problems = orbit.split_problems(settings.seed, settings.eval_problems)[1] * settings.samples
    responses = sample(student, problems, settings.student_tokens, settings.seed)
    endless = [index for index, response in enumerate(responses) if response[-1] != orbit.WORD_ID[orbit.EOS]]
    measured: dict[str, float | None] = {
        "student_accuracy": accuracy(problems, responses),
        "student_unfinished": len(endless) / len(responses),
        "student_mean_tokens": sum(map(len, responses)) / len(responses),
    }
    divergences_ST = [reverse_kl(student, teacher, problems[index], responses[index]) for index in endless[:128]]
    for name, part in (("early", EARLY), ("late", LATE)):
        values = torch.cat([torch.empty(0), *(divergence_T[part] for divergence_T in divergences_ST)])
        measured[f"unfinished_reverse_kl_{name}"] = values.mean().item() if len(values) else None
    return measured


def reverse_kl(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, problem: orbit.Problem, response: list[int]
) -> torch.Tensor:
    """KL(student || teacher) in nats at each token of a response, over the full vocabulary."""
    import torch

    prompt = orbit.encode(orbit.prompt_words(problem))
    ids = torch.tensor([prompt + response])
    with torch.inference_mode():
        logp_TV, logq_TV = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher))
    return (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1)
