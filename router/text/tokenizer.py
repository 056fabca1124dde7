"""The model's tokenizer, read straight from `tokenizer.json`, or from what a conversion makes of the files.

`transformers` is not used here: importing its tokenizer classes imports torch, which the router must never
hold (two seconds of start, and hundreds of MiB, for nothing). A checkpoint that needs it gets a process of
its own (router/text/conversion.py).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from router.config import RouterConfigError
from router.text.ascii_bpe import AsciiBpeEncoder
from router.text.checkpoint import read_json
from router.text.conversion import Converted, convert
from router.text.decoder_chain import DecoderChain, byte_level_bytes, byte_level_table
from router.text.decoders import byte_of
from router.text.detokenizer import ByteDetokenizer, ChainDetokenizer, Continuation, Pieces
from router.text.tokenizer_keys import check_keys, why_converted

log = logging.getLogger(__name__)

MAX_ASCII_BPE_CHARACTERS = 8192
"""The library encodes longer texts."""


class TextTokenizer:
    """Encodes, decodes and detokenizes for one checkpoint directory. Raises RouterConfigError on loading.

    `converted` is what a conversion made of it before; after loading, what one made, if one was needed."""

    def __init__(self, model_dir: Path, converted: Converted | None = None) -> None:
        path = model_dir / "tokenizer.json"
        self.converted: Converted | None = None
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
            self.converted = converted or convert(model_dir)
            path, content = model_dir, self.converted.tokenizer
            self.special_tokens = self.converted.special_tokens
            values = json.loads(content)
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
        names = frozenset(entry.content for entry in added.values() if entry.special)
        try:
            self._chain = DecoderChain(values.get("decoder"))
        except ValueError as error:
            raise RouterConfigError(f"{path}: {error}") from error
        if not self._chain.streams:
            log.warning("%s: its decoder needs a whole text, so a stream's comes at its end", path)
        self._shown = Pieces(self._tokenizer, self.size, frozenset(), self._chain.first)
        self._unspecial = Pieces(self._tokenizer, self.size, names, self._chain.first)
        self._all_bytes: list[bytes] = []
        self._text_bytes: list[bytes] = []
        table = byte_level_table()
        if self._chain.byte_level:
            all_names = [self._tokenizer.id_to_token(token) or "" for token in range(self.size)]
            self._all_bytes = [byte_level_bytes(name, table) for name in all_names]
            self._text_bytes = [
                b"" if name in names else piece
                for name, piece in zip(all_names, self._all_bytes, strict=True)
            ]
        stand_ins = {byte: text for text, byte in table.items()}
        self._ascii_bpe = AsciiBpeEncoder.make(self._tokenizer, values, stand_ins)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids."""
        if len(text) <= MAX_ASCII_BPE_CHARACTERS and self._ascii_bpe is not None:
            known = self._ascii_bpe.encode(text, add_special_tokens)
            if known is not None:
                return known
        # Without the offsets of each token, which take a third of the time.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        detokenizer = self.detokenizer(special=not skip_special_tokens)
        return detokenizer.push(tokens) + detokenizer.flush()

    def continuation(self, prompt: Sequence[int]) -> Continuation:
        return Continuation(prompt, self.detokenizer())

    def detokenizer(self, special: bool = False) -> ByteDetokenizer | ChainDetokenizer:
        """For a text that begins with its tokens. `special`: special tokens are shown."""
        if self._chain.byte_level:
            return ByteDetokenizer(self._all_bytes if special else self._text_bytes)
        pieces = self._shown if special else self._unspecial
        return ChainDetokenizer(pieces, self._chain.others, self._chain.local)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for amid others; a special token's are those of its name."""
        if self._chain.byte_level:
            return self._all_bytes[token] if 0 <= token < self.size else b""
        if token in self.special:
            return str(self._tokenizer.id_to_token(token)).encode()
        piece = self._shown[token]
        if piece is None:
            return b""
        byte = byte_of(piece) if self._chain.has_bytes else None
        return self._chain.middle(piece).encode() if byte is None else bytes((byte,))

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")
