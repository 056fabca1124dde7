"""What may be meant by a path that holds no model."""

from pathlib import Path


def hint(path: Path) -> str:
    """What to do instead, to be put behind an error; empty where nothing suggests itself."""
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return "; GGUF is not supported: use the original checkpoint, with config.json and safetensors"
    if (path / "adapter_config.json").exists():
        return "; it holds an adapter (LoRA): merge it into its base model and save that"
    if (path / "params.json").exists():
        return "; params.json is the maker's own format: convert it to a Hugging Face directory"
    if not path.exists() and not path.is_absolute() and len(path.parts) == 2:
        return f"; if {path} is a model of a hub, download it first: nothing is fetched here"
    if path.is_file():
        return "; give the directory, not one of its files"
    return ""
