"""What a model must be: positions, layers, its own last token; and what is refused or told of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from bench.config.sections import ModelConfig
from bench.models import fit
from bench.models.encoders import build_model
from bench.models.tokens import encode
from fedara_core.adapters import inject
from fedara_core.errors import InputError
from support.models import GPT2, SIZES, write_model

DECODERS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, padding id -1": transformers.LlamaConfig(**SIZES, pad_token_id=-1),
    "llama, end tokens": transformers.LlamaConfig(**SIZES, eos_token_id=[3, 2]),
    "gpt2": GPT2,
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES, bos_token_id=3, eos_token_id=3),
    "ctrl": transformers.CTRLConfig(
        vocab_size=20, n_embd=16, dff=16, n_layer=1, n_head=2, n_positions=40
    ),
    "xlnet": transformers.XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16),
}
# "!" has id 0, and "<end>" pads where the tokeniser has it as its end or padding token.
TEXTS = ["rain !", "wind cloud soup bread rain", "! !", "soup <end>", "<end> <end> <end>"]


def logits_of(config: ModelConfig, rows: list[int]) -> Tensor:
    model = build_model(config, num_classes=3, seed=0).model.eval()
    batch = encode(config, TEXTS, np.zeros(len(TEXTS))).batch(
        torch.tensor(rows), torch.device("cpu")
    )
    del batch["labels"], batch["texts"]
    with torch.no_grad():
        return model(**batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("special", [{}, {"eos_token": "<end>"}, {"pad_token": "<end>"}])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_looks_at_the_last_word_whatever_pads(
    name: str, special: dict[str, str], tmp_path: Path
) -> None:
    """In a batch each text has the logits that it has alone, without padding."""
    config = write_model(tmp_path, DECODERS[name], **special)
    config = config.model_copy(update={"pooling": "model"})
    together = logits_of(config, list(range(len(TEXTS))))
    for row in range(len(TEXTS)):
        torch.testing.assert_close(logits_of(config, [row])[0], together[row], rtol=0, atol=1e-6)
    assert (together[0] - together[2]).abs().max() > 1e-5


def test_the_logits_are_those_of_transformers_for_one_text(tmp_path: Path) -> None:
    """Without any padding id transformers takes the last token of a single text."""
    config = write_model(tmp_path, transformers.LlamaConfig(**SIZES)).model_copy(
        update={"pooling": "model"}
    )
    model: Any = build_model(config, num_classes=3, seed=0).model.eval()
    ids = encode(config, ["wind rain !"], np.zeros(1)).input_ids.long()
    hidden = model.model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(
        model(ids, torch.ones_like(ids)), model.model.score(hidden[:, -1]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("special", "padding"), [({"pad_token": "[UNK]", "eos_token": "<end>"}, 2), ({}, 1)]
)
def test_the_padding_id_of_a_decoder(special: dict[str, str], padding: int, tmp_path: Path) -> None:
    """The tokeniser's padding token; with none, and no end token, the end token of the config."""
    config = write_model(tmp_path, transformers.LlamaConfig(**SIZES, eos_token_id=[1]), **special)
    assert encode(config, ["rain", "rain rain"], np.zeros(2)).input_ids[0].tolist() == [1, padding]
    config = config.model_copy(update={"pooling": "model"})
    model: Any = build_model(config, num_classes=2, seed=0).model
    assert model.model.config.pad_token_id == padding
    assert model.model.model.embed_tokens.padding_idx is None


# ---- positions ----


@pytest.mark.parametrize("pad", [0, 1, 5])
@pytest.mark.parametrize("kind", ["XLMRoberta", "Esm", "Data2VecText"])
def test_positions_that_are_counted_after_the_padding_id(
    kind: str, pad: int, tmp_path: Path
) -> None:
    settings = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=pad)
    if kind == "Esm":
        settings.position_embedding_type = "absolute"
    config = write_model(tmp_path, settings)
    fits = config.model_copy(update={"max_length": 39 - pad})
    assert build_model(fits, num_classes=2, seed=0).head
    too_long = config.model_copy(update={"max_length": 40 - pad})
    with pytest.raises(InputError, match=rf"max_length = {40 - pad} .* allowed: 4 to {39 - pad}$"):
        build_model(too_long, num_classes=2, seed=0)


def test_mpnet_counts_after_id_1_whatever_its_padding_id(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.MPNetConfig(**SIZES, pad_token_id=5))
    with pytest.raises(InputError, match=r"max_length = 39 .* allowed: 4 to 38$"):
        build_model(config.model_copy(update={"max_length": 39}), num_classes=2, seed=0)


def test_bert_uses_all_its_positions(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    assert build_model(config.model_copy(update={"max_length": 40}), num_classes=2, seed=0).head


# ---- models that are none ----


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize(
    "settings",
    [
        transformers.T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
        transformers.BartConfig(
            vocab_size=20,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        ),
    ],
)
def test_an_encoder_decoder_is_refused(settings: Any, pooling: Any, tmp_path: Path) -> None:
    config = write_model(tmp_path, settings).model_copy(update={"pooling": pooling})
    with pytest.raises(InputError, match=r"is an encoder-decoder \((t5|bart)\): .* allowed: an en"):
        build_model(config, num_classes=2, seed=0)


def test_a_model_that_can_not_read_short_texts_is_refused(tmp_path: Path) -> None:
    """Nystromformer takes texts of whole segments only."""
    settings = transformers.NystromformerConfig(**SIZES, num_landmarks=4, segment_means_seq_len=16)
    with pytest.raises(InputError, match=r"does not work on texts of 3 and .* allowed") as caught:
        build_model(write_model(tmp_path, settings), num_classes=2, seed=0)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_mask_is_told_of(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    config = write_model(tmp_path, transformers.FNetConfig(**sizes))
    with pytest.warns(RuntimeWarning, match="does not heed the attention_mask"):
        build_model(config, num_classes=2, seed=0)


def test_the_check_leaves_the_random_numbers_and_the_modes(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    model = build_model(config, num_classes=2, seed=0).model
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    fit.require_logits(config, model, 0, 2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attention_that_a_model_lacks_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.MPNetConfig(**SIZES))
    with pytest.raises(InputError, match=r"model.attention = 'sdpa': .* allowed: eager$"):
        build_model(config.model_copy(update={"attention": "sdpa"}), num_classes=2, seed=0)


# ---- code of a model's own ----


def write_code(folder: Path, **entries: Any) -> Path:
    """A folder whose config names classes in a module, which leaves a file when it runs."""
    ran = folder / "ran"
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": "own.Words"}
    old = json.loads((folder / "config.json").read_text()) if entries else {}
    config = {"model_type": "own", **old, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    return ran


def test_code_of_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = write_code(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with pytest.raises(InputError, match="it comes with code of its own, which is not run"):
        build_model(ModelConfig(name=str(tmp_path)), num_classes=2, seed=0)
    assert not ran.exists()
    assert capsys.readouterr().out == ""


def test_code_beside_a_model_that_transformers_has_is_not_run(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    ran = write_code(tmp_path, known=True)
    assert build_model(config, num_classes=2, seed=0).head
    assert len(encode(config, ["rain"], np.zeros(1))) == 1
    assert not ran.exists()


# ---- GPT-2's layers ----


def test_gpt2_has_adapters_and_keeps_its_function(tmp_path: Path) -> None:
    config = write_model(tmp_path, GPT2).model_copy(update={"packing": False})
    classifier = build_model(config, num_classes=2, seed=0)
    encoder: Any = classifier.model.get_submodule("encoder")
    plain = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(
        encoder(input_ids=ids)[0], plain(input_ids=ids)[0], rtol=0, atol=1e-5
    )
    adapted = inject(classifier.model, "all-linear", classifier.head)
    assert len(adapted.adapters) == 2 * 4
    assert adapted.shapes["encoder.h.0.attn.c_attn"] == (48, 16)


def test_conv1d_and_back_is_the_same_model(tmp_path: Path) -> None:
    write_model(tmp_path, GPT2)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit.with_linear(model)
    assert not any(type(layer).__name__ == "Conv1D" for layer in model.modules())
    fit.with_conv1d(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_without_linear_layers_says_what_it_has() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Conv1d(4, 4, 1))
    with pytest.raises(InputError, match=r"no nn.Linear, only Conv1d, Embedding; allowed: models"):
        inject(module, "all-linear", [])


def test_a_model_whose_only_linear_layer_is_the_head_says_so() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"but for its head, the model has no nn\.Linear"):
        inject(module, ["query"], ["1.weight", "1.bias"])
