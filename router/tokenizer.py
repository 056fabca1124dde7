"""The model's tokenizer, read straight from `tokenizer.json`, or from what a conversion makes of the files.

`transformers` is not used here: importing its tokenizer classes imports torch, which the router must never
hold (two seconds of start, and hundreds of MiB, for nothing). A checkpoint that needs it gets a process of
its own (router/conversion.py).
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from router.checkpoint import read_json
from router.config import RouterConfigError
from router.conversion import convert
from router.text import ByteDetokenizer, Detokenizer, StreamDetokenizer
from router.tokenizer_keys import check_keys, why_converted
from router.words import WordEncoder

log = logging.getLogger(__name__)

THREAD_CHARACTERS = 8192
"""Longer texts are encoded in a thread: about 2 ms, what other streams may have to wait."""
ENCODING_THREADS = 2


_BYTE_FALLBACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
"""How decoding begins in what transformers makes of sentencepiece models."""
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _bytes_of_byte_level() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2; Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class TextTokenizer:
    """Encodes, decodes and detokenizes for one checkpoint directory. Raises RouterConfigError on loading."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        self.special_tokens: Mapping[str, str] = {}
        """By role, `bos_token` and others: only of a converted tokenizer, whose class knows them."""
        values = read_json(path) if path.exists() else {}
        model = values.get("model")
        if unread := check_keys(model_dir, model.get("type", "BPE") if isinstance(model, dict) else "BPE"):
            log.warning("tokenizer_config.json: not read: %s", ", ".join(unread))
        reason = why_converted(model_dir, values) if path.exists() else ""
        if reason is None:
            content = path.read_text(encoding="utf-8")
        else:
            if reason:
                log.warning("%s: converted by transformers at each start: %s", path, reason)
            converted = convert(model_dir)
            path, content, self.special_tokens = model_dir, converted.tokenizer, converted.special_tokens
            values = json.loads(content)
        decoder = values.get("decoder")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise RouterConfigError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise RouterConfigError(f"{path} has an empty vocabulary")
        self.size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        self._byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        steps = decoder.get("decoders", []) if isinstance(decoder, dict) else []
        self._byte_fallback = steps[:3] == _BYTE_FALLBACK and steps[3:] in ([], [_STRIP])
        self._strip = steps[3:] == [_STRIP]
        self._all_bytes = self._token_bytes(vocabulary)
        self._text_bytes = [
            b"" if token in self.special else piece for token, piece in enumerate(self._all_bytes)
        ]
        stand_ins = {byte: text for text, byte in _bytes_of_byte_level().items()}
        self._words = WordEncoder.make(self._tokenizer, values, stand_ins)
        self._threads = asyncio.Semaphore(ENCODING_THREADS)

    def _token_bytes(self, vocabulary: dict[str, int]) -> list[bytes]:
        table = _bytes_of_byte_level()
        pieces = [b""] * self.size
        for text, token in vocabulary.items():
            if token in self.special and not self._byte_level:
                pieces[token] = text.encode()
            elif self._byte_level:
                stand_ins = [table.get(character) for character in text]
                known = [byte for byte in stand_ins if byte is not None]
                pieces[token] = bytes(known) if len(known) == len(stand_ins) else text.encode()
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                pieces[token] = bytes.fromhex(text[3:5])
            else:
                pieces[token] = text.replace("▁", " ").encode()
        return pieces

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. A short text is encoded at once, a long one in a thread beside the event loop."""
        if len(text) <= THREAD_CHARACTERS:
            words = None if self._words is None else self._words.encode(text, add_special_tokens)
            if words is not None:
                return words
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        async with self._threads:
            return await asyncio.to_thread(self._encode_long, text, add_special_tokens)

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        # Only the batch call lets go of the interpreter lock.
        batch = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(
            [token for token in tokens if token < self.size], skip_special_tokens=skip_special_tokens
        )
        return text

    def detokenizer(self, continues: bool = False) -> Detokenizer:
        """`continues`: the tokens follow others, so that a space which begins their text belongs to it."""
        if self._byte_level or self._byte_fallback:
            return ByteDetokenizer(self._text_bytes, self._strip and not continues)
        return StreamDetokenizer(self._tokenizer, self.size)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a special token's are those of its name."""
        return self._all_bytes[token] if 0 <= token < self.size else b""

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")
