"""The chain of decoder stages (decoders.py) that the `decoder` of a tokenizer.json stands for. Pure."""

import json
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from router.text.decoders import (
    Bytes,
    Collapse,
    Decode,
    DecoderStage,
    Each,
    FirstDiffers,
    Hoard,
    LastDiffers,
    Memo,
    Substitute,
    Trim,
    Utf8,
)

_BLANK: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip


class DecoderChain:
    """A tokenizer without a decoder joins its tokens with spaces. Raises ValueError for one that is not
    known."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        parts = [] if decoder is None else _flat(decoder)
        kinds = [part["type"] for part in parts]
        self.byte_level = kinds == ["ByteLevel"]
        self.has_bytes = "ByteFallback" in kinds
        self.stages: list[DecoderStage] = []
        if decoder is None:
            self.stages.append(FirstDiffers(str, Memo(lambda item: f" {item}")))
        fused = False
        for part in parts:
            if part["type"] == "Fuse":
                fused = True
                continue
            self.stages.append(_on_one_item(part) if fused else _on_items(part))
            fused = fused or part["type"] == "ByteLevel"
        self.streams = not any(isinstance(stage, Hoard) for stage in self.stages)
        """Else the text comes when all tokens are there."""
        self.first = list(takewhile(lambda stage: isinstance(stage, Each), self.stages))
        """These see a token by itself, the others in its order."""
        self.others = self.stages[len(self.first) :]
        self.local = not any(
            isinstance(stage, Hoard | Substitute | Utf8) or (isinstance(stage, Bytes) and index)
            for index, stage in enumerate(self.others)
        )
        """Whether the last tokens of a text say what comes of the next ones (`ChainDetokenizer.follow`)."""

    def middle(self, item: str) -> str:
        """What the others make of one item amid others."""
        for stage in self.others:
            item = stage.middle(item)
        return item


def byte_level_table() -> dict[str, int]:
    """The byte that each printable stand-in of byte-level vocabularies means (GPT-2; Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


def byte_level_bytes(item: str, table: dict[str, int]) -> bytes:
    """An item with a character that stands for no byte is text."""
    known = [byte for character in item if (byte := table.get(character)) is not None]
    return bytes(known) if len(known) == len(item) else item.encode()


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for one in decoder["decoders"] for part in _flat(one)]


def _library(decoder: dict[str, Any]) -> Decode:
    """What the library does with a list of items."""
    tokenizer = Tokenizer.from_str(json.dumps({**_BLANK, "decoder": decoder}))
    decode: Decode = tokenizer.decoder.decode
    return decode


def _on_items(part: dict[str, Any]) -> DecoderStage:
    match part["type"]:
        case "ByteFallback":
            return Bytes()
        case "Strip":
            # The library's panics on items that are shorter than what it would strip.
            content, start, stop = part["content"], part["start"], part["stop"]
            return Each(lambda item: "".join(Trim(content, start, stop).push([item])))
        case "ByteLevel":
            table = byte_level_table()
            return Utf8(Memo(lambda item: byte_level_bytes(item, table)))
    if part["type"] not in ("Replace", "BPEDecoder", "CTC", "Metaspace", "WordPiece"):
        raise ValueError(f"its decoder {part['type']!r} is not known")
    decode = _library(part)
    if part["type"] == "Replace":
        return Each(lambda item: decode([item]))
    if part["type"] == "BPEDecoder":
        return LastDiffers(lambda item: decode([item]), Memo(lambda item: decode([item, ""])))
    if part["type"] == "CTC":
        return Collapse(Memo(lambda item: decode([item])))
    return FirstDiffers(lambda item: decode([item]), Memo(lambda item: decode(["", item])))


def _on_one_item(part: dict[str, Any]) -> DecoderStage:
    """What comes after Fuse or ByteLevel."""
    if part["type"] == "Strip":
        return Trim(part["content"], part["start"], part["stop"])
    if part["type"] == "Replace" and part["pattern"].get("String"):
        return Substitute(part["pattern"]["String"], part["content"])
    return Hoard(_library(part))
