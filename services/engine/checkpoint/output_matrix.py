"""Whether a model's output matrix is its embedding, which the configuration may get wrong."""

from pathlib import Path

from services.engine.checkpoint.safetensors_files import StoredFile, StoredTensor, read_checkpoint_files
from services.engine.errors import CheckpointError

_BLOCK_BYTES = 8 << 20
_HEADS = ("lm_head.weight", "model.lm_head.weight")
_EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")

_Found = tuple[StoredFile, StoredTensor]


def stored_head(model_dir: Path) -> str:
    """What the files of a model that ties the two hold: `none`, `same` or `other` for a head beside the
    embedding, `only` for a head alone. Files that cannot be read are reported by whoever needs them: `none`.

    The bytes are compared, up to the first that differs. A head in another dtype is another: kept, it gives
    the tokens that it would give if it were the embedding's copy.
    """
    try:
        files = read_checkpoint_files(model_dir)
    except CheckpointError:
        return "none"
    head, embedding = _find(files, _HEADS), _find(files, _EMBEDDINGS)
    if head is None:
        return "none"
    if embedding is None:
        return "only"
    return "same" if _same(head, embedding) else "other"


def _find(files: list[StoredFile], names: tuple[str, ...]) -> _Found | None:
    for file in files:
        for tensor in file.tensors:
            if tensor.name in names:
                return file, tensor
    return None


def _same(one: _Found, other: _Found) -> bool:
    if (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    with one[0].path.open("rb") as first, other[0].path.open("rb") as second:
        first.seek(one[1].begin)
        second.seek(other[1].begin)
        left = one[1].byte_count
        while left > 0:
            block = min(left, _BLOCK_BYTES)
            if first.read(block) != second.read(block):
                return False
            left -= block
    return True
