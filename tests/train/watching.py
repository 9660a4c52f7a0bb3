"""A run that is watched, without training: samples and records, and what was written read back by others' readers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

from katds.core.types import LENGTH, Cut, Prompt, Rollout, RolloutRequest
from katds.train.samples import Sample, describe
from katds.train.writers import Watched


def watched(folder: Path, start: int = 0, steps: int = 20, name: str = "one") -> Watched:
    folder.mkdir(parents=True, exist_ok=True)
    return Watched(
        folder,
        name,
        start,
        steps,
        "run: {name: one}\nstop:\n  kind: kat\n",
        {"run": {"name": name}, "stop": {"window": 64}},
    )


def sample(texts: list[str], kept: int, at: int | None, prompt: str = "p", i: int = 7) -> Sample:
    """Of an audit rollout with a token per text."""
    request = RolloutRequest(i, Prompt(0, (-1,)), 99, audit=True)
    cut = None if at is None else Cut(kept, at, "kat")
    written = Rollout(request, list(range(len(texts))), kept, LENGTH, cut, [0.25] * len(texts))
    return describe(written, lambda ids: "".join(prompt if i == -1 else texts[i] for i in ids), lambda of: True)


def events(folder: Path) -> EventAccumulator:
    """Everything in a folder's event files."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    return read


def pages(folder: Path) -> dict[int, str]:
    """Step -> text of the tab Text."""
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events(folder).Tensors("rollouts/text_summary")}


def charts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Category -> chart -> tags, as TensorBoard's own plugin answers its page."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugins: dict[str, object] = {}
    context = TBContext(data_provider=provider, logdir=str(folder), plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    plugin, request = CustomScalarsPlugin(context), RequestContext()
    found: dict[str, dict[str, list[str]]] = {}
    for category in json.loads(plugin.layout_impl(request, ""))["category"]:
        for chart in category["chart"]:
            answers = [plugin.scalars_impl(request, ".", tag, "") for tag in chart["multiline"]["tag"]]
            assert all(answer["regex_valid"] for answer in answers)
            tags = [tag for answer in answers for tag in answer["tag_to_events"]]
            found.setdefault(category["title"], {})[chart["title"]] = sorted(tags)
    return found


class Seen(HTMLParser):
    """What a browser shows of preformatted blocks, with the tags around each."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.blocks: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs, f"{tag} has {attrs}"
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "pre":
            self.blocks.append(((), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.blocks[-1] = (tuple(self._open), self.blocks[-1][1] + data)


def wandb_records(folder: Path) -> list[Any]:
    """All records of an offline run of Weights & Biases that was finished: its own process closes the file a little later."""
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60
    while not (found := list(_records(file.read_bytes()))) or not found[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{file} has no end; it holds {len(found)} records"
        time.sleep(0.2)
    return found


def _records(data: bytes) -> Iterator[Any]:
    """Protobufs of W&B, in LevelDB's log format behind a header of 7 bytes; as far as they are there."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        at += 7 + length
        if at > len(data):
            return
        whole += data[at - length : at]
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
