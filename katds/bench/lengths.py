"""Lengths of rollouts to pack: real ones of the demo under two stop rules, and a long tail up to 4096 tokens.

The demo's are from launch/recipes/demo.yaml with `--run.rollout_samples 256` on two ranks, seed 0:
what rank 0 wrote in steps 5 to 45, after the rule's warm-up. Length: the tokens that the learner computes, prompt + kept response - 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

PROMPT_TOKENS = 200  # of the synthetic rollouts

# "rollouts*tokens", ascending in tokens.
KAT = """
1*9 5*14 474*15 2*16 1*18 2*19 3*20 434*21 1*26 343*27 1*28 879*31 1*32 317*33 24*34 1*35 1*36 205*37 2*38 305*39
30*40 199*43 276*45 12*46 160*49 245*51 12*52 1*54 92*55 1*56 121*57 14*58 105*61 108*63 11*64 68*67 84*69 7*70 3*72
48*73 64*75 7*76 43*79 40*81 5*82 20*85 1*86 40*87 1*88 28*91 1*92 28*93 2*94 20*97 22*99 4*100 17*103 22*105 3*106
14*109 14*111 2*112 1*114 9*115 12*117 2*118 7*121 10*123 6*127 1*128 13*129 2*133 11*135 2*136 4*139 12*141 2*142
1*144 6*145 7*147 4*151 12*153 1*154 5*157 8*159 1*160 2*163 8*165 1*169 4*171 4*172 3*175 2*177 2*181 2*183 1*187
5*189 1*193 2*195 2*201 4*207 2*213 1*217 2*219 1*223 2*225 1*231 1*235 1*243 1*247 3*253 1*255 2*259 2*261 1*265
1*267 1*271 2*273 3*279 2*285 1*289 1*291 1*295 1*297 1*301 1*303 61*327
"""

NEVER = """
6*14 445*15 3*16 2*18 1*19 3*20 432*21 1*26 339*27 2*28 2*32 281*33 2*36 2*38 303*39 1*43 2*44 277*45 2*50 229*51
193*57 4*58 174*63 1*64 131*69 1*72 1*74 122*75 5*76 94*81 1*82 106*87 2*88 73*93 1*94 71*99 1*104 64*105 1*106 62*111
65*117 62*123 44*129 2*130 39*135 28*141 23*147 1*148 1*150 22*153 18*159 1*164 22*165 12*171 1*172 16*177 12*183
2*184 12*189 11*195 1*196 1*200 11*201 12*207 4*213 13*219 13*225 13*231 3*237 4*243 6*249 4*255 5*261 8*267 4*273
5*279 6*285 1*286 6*291 2*292 4*297 2*298 4*303 10*309 1*310 4*315 3*321 1260*327
"""


@dataclass(frozen=True)
class Lengths:
    """A distribution of rollout lengths.

    Args:
        longest: tokens that the recipe allows a rollout, prompt included.
        source: where the lengths come from, for the reader of a table.
        drawn: (generator, count) -> lengths.
    """

    longest: int
    source: str
    drawn: Callable[[random.Random, int], list[int]]

    def draw(self, count: int, seed: int) -> list[int]:
        """`count` independent lengths in tokens; equal seeds give equal lengths."""
        return self.drawn(random.Random(seed), count)


def recorded(counts: str) -> Callable[[random.Random, int], list[int]]:
    """Draws with replacement from what was recorded."""
    pairs = [pair.split("*") for pair in counts.split()]
    weights, tokens = [int(weight) for weight, _ in pairs], [int(length) for _, length in pairs]
    return lambda draw, count: draw.choices(tokens, weights, k=count)


def long_tail(draw: random.Random, count: int) -> list[int]:
    """Log-normal responses, median 800 and sigma 1, up to 4096."""
    return [PROMPT_TOKENS + min(4096, math.ceil(draw.lognormvariate(math.log(800), 1.0))) for _ in range(count)]


LENGTHS = {
    "demo-kat": Lengths(336, "5276 rollouts of the demo, ended by KAT", recorded(KAT)),
    "demo-never": Lengths(336, "5247 rollouts of the demo, none ended by a rule", recorded(NEVER)),
    "long-tail": Lengths(
        PROMPT_TOKENS + 4096,
        "synthetic; log-normal, median 800 and sigma 1, prompts of 200: 5 % of the responses reach the limit of 4096; "
        "the long tail is reported of RL systems (e.g. arXiv 2509.21009), the parameters are ours",
        long_tail,
    ),
}
