"""Rollouts as a page for people: what is learnt from in bold, then the stretch of agreement that ends it, and indented, what lies behind
the cut.

Only tags that TensorBoard's text tab lets through, so that the same page serves everywhere.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from katds.train.samples import Sample

MOST_CHARACTERS = 2000  # of each part of a rollout; more is left out in its middle
# Markdown looks for fences of code before it looks at HTML.
_FENCES = {ord(character): f"&#{ord(character)};" for character in "`~"}
# A model may write anything. What is no text would be dropped or move the cursor: shown by its picture (U+2400 ...).
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def page(samples: Sequence[Sample]) -> str:
    """HTML that Markdown leaves as it is. At most seven parts of `MOST_CHARACTERS` per sample."""
    return "\n\n".join(_blocks(sample) for sample in samples)


def document(samples: Sequence[Sample]) -> str:
    """The page as a file of its own, which says how its letters are encoded."""
    return f'<!DOCTYPE html>\n<meta charset="utf-8">\n{page(samples)}\n'


def _blocks(sample: Sample) -> str:
    _, agreed, behind = sample.parts
    kept, hole, after = sample.around_hole
    blocks = [f"<h4>{html.escape(_heading(sample))}</h4>", _text("prompt", sample.prompt)]
    if sample.prefix:
        blocks.append(_text("begun by the teacher", sample.prefix))
    blocks.append(_text(f"kept: {sample.kept} of {sample.tokens} tokens", kept, "<pre><strong>{}</strong></pre>"))
    if hole:
        blocks.append(_text("kept, but not learnt from", hole))
    if after:
        blocks.append(_text("kept, after that", after, "<pre><strong>{}</strong></pre>"))
    if agreed:
        blocks.append(_text("up to where the rule ends it, not learnt from", agreed))
    if behind:
        shape = "<blockquote><pre><em>{}</em></pre></blockquote>"
        blocks.append(_text("behind the cut, written for the audit", behind, shape))
    return "\n\n".join(blocks)


def _heading(sample: Sample) -> str:
    verdict = {True: ", right", False: ", wrong", None: ""}[sample.right]
    audit = " (audit)" if sample.audit else ""
    return f"rollout {sample.id}{audit}: ended by {sample.reason}{verdict}"


def _text(title: str, text: str, shape: str = "<pre>{}</pre>") -> str:
    escaped = html.escape(_shortened(text.translate(_CONTROLS))).translate(_FENCES)
    return f"<p>{html.escape(title)}</p>\n\n" + shape.format(escaped)


def _shortened(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out} characters ...]\n{text[-half:]}"
