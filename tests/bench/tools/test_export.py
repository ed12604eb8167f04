"""fedara export: every method's folder, loaded by PEFT or transformers, gives the same logits."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.config.load import load_runs
from bench.models.encoders import build_model
from bench.run.checkpoint import save_checkpoint
from bench.tools.export import export, load_trained, lora_pairs
from fedara_core.adapters import Adapter
from fedara_core.errors import InputError
from fedara_core.method import load_method, method_names
from fedara_core.seeds import derive
from support.models import write_model
from support.rounds import make_tiny_job, play_rounds

LABELS = {"num_labels": 4, "pad_token_id": 0}
TINY = Path(__file__).parents[2] / "tiny.toml"


@pytest.fixture(params=method_names())
def method_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def finished_run(folder: Path, *overrides: str) -> Path:
    """What a run leaves that export reads: run.json and the last state."""
    # toy is no transformers model
    overrides = ("model.name=tiny", "federation.num_rounds=3", "train.lr=2e-2", *overrides)
    job = make_tiny_job(*overrides)
    last = play_rounds(job)[-1].after
    (config,) = load_runs(TINY, list(overrides))
    run = {
        "config": config.canonical(),
        "labels": list(job.labels),
        **job.digests,
    }
    (folder / "run.json").write_text(json.dumps(run))
    save_checkpoint(folder, last, job.client_state, job.belongs_to)
    return folder


def tokens() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 2000, (4, 9), generator=drawn)
    attention_mask = torch.ones(4, 9, dtype=torch.long)
    attention_mask[1:, 6:], ids[1:, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": attention_mask}


def base_model(auto: str, config: object) -> nn.Module:
    """The model as it was before training: what a hub name would load."""
    if config.model.name != "tiny":
        torch.manual_seed(derive(config.seed, "head"))
        cls = getattr(transformers, auto)
        model = cls.from_pretrained(config.model.name, **({} if auto == "AutoModel" else LABELS))
        return model.eval()
    padded = config.model.model_copy(update={"packing": False})  # what transformers itself reads
    classifier = build_model(padded, num_classes=4, seed=config.seed)
    found = classifier.model.encoder if auto == "AutoModel" else classifier.model.model
    return found.eval()


def logits_of(folder: Path, config: object) -> Tensor:
    """The logits of an exported folder, loaded as its README says."""
    pooled = (folder / "head.safetensors").exists()
    auto = "AutoModel" if pooled else "AutoModelForSequenceClassification"
    if (folder / "adapter_config.json").exists():
        model = peft.PeftModel.from_pretrained(base_model(auto, config), str(folder))
    else:
        model = getattr(transformers, auto).from_pretrained(folder)
    model.eval()
    batch = tokens()
    with torch.no_grad():
        if not pooled:
            return model(**batch).logits
        head = load_file(folder / "head.safetensors")
        kept = batch["attention_mask"][..., None]
        pooled_states = (model(**batch)[0] * kept).sum(1) / kept.sum(1)
        return pooled_states @ head["weight"].T + head["bias"]


@torch.no_grad()
def is_linear(adapter: Adapter) -> bool:
    """f(x) + f(y) = f(x + y) + f(0), with entries that leave no non-linearity unseen."""
    x, y = 10 * torch.randn(2, 16, adapter.shape[1], generator=torch.Generator().manual_seed(1))
    both = adapter(x + y) + adapter(torch.zeros_like(x))
    return torch.allclose(adapter(x) + adapter(y), both, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_an_exported_run_has_the_same_logits(
    method_name: str, pooling: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    overrides = (f"method.name={method_name}", f"model.pooling={pooling}")
    run_dir = finished_run(tmp_path / "run", *overrides)
    client = 0
    if load_method(method_name).personal:
        with pytest.raises(InputError, match=r"--client None: .* has a model for each client"):
            export(run_dir, tmp_path / "out", None)
        data = load_file(run_dir / "checkpoint.safetensors")
        client = min(int(k.split("/")[0].split("-")[1]) for k in data if k.startswith("client-"))
    chosen = client if load_method(method_name).personal else None
    trained = load_trained(run_dir, chosen)
    with torch.no_grad():
        expected = trained.model(**tokens())
    if not all(is_linear(adapter) for adapter in trained.adapted.adapters.values()):
        with pytest.raises(InputError, match="is no linear layer after training"):
            export(run_dir, tmp_path / "out", chosen)
        assert not (tmp_path / "out").exists()
        return
    said = export(run_dir, tmp_path / "out", chosen)
    assert f"{method_name} after round 3 of 3" in said
    assert "packed" not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    logits = logits_of(tmp_path / "out", trained.config)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    untrained = build_model(trained.config.model, num_classes=4, seed=trained.config.seed).model
    with torch.no_grad():
        assert not torch.allclose(untrained.eval()(**tokens()), expected, atol=1e-2)


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize(
    ("method", "kind"), [("lora", "PEFT"), ("full", "merged"), ("fedex_lora", "merged")]
)
def test_gpt2_is_exported_with_its_own_layers(
    method: str, kind: str, pooling: str, tmp_path: Path
) -> None:
    """Its layers hold their weights the other way round; c_proj's are square."""
    settings = transformers.GPT2Config(
        vocab_size=2000, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    for name in ("model", "run"):
        (tmp_path / name).mkdir()
    write_model(tmp_path / "model", settings)
    words = (f"model.name={tmp_path / 'model'}", f"method.name={method}", "train.lr=1e-2")
    words += (f"model.pooling={pooling}", "model.attention=eager")
    run_dir = finished_run(tmp_path / "run", *words)
    assert export(run_dir, tmp_path / "out", None).startswith(kind)
    trained = load_trained(run_dir)
    with torch.no_grad():
        expected = trained.model(**tokens())
    exported = logits_of(tmp_path / "out", trained.config)
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-4)


def test_what_a_codec_left_out_is_no_part_of_a_client(tmp_path: Path) -> None:
    words = ("method.name=fedsa_lora", "codec.up=int8", "codec.error_feedback=true")
    run_dir = finished_run(tmp_path, *words)
    data = load_file(run_dir / "checkpoint.safetensors")
    clients = [key for key in data if key.endswith("codec_residual")]
    assert clients
    client_id = int(clients[0].split("/")[0].split("-")[1])
    assert load_trained(run_dir, client_id).config.method.name == "fedsa_lora"


def test_a_peft_folder_says_with_which_dropout_it_trained(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path, "method.name=lora", "adapter.dropout=0.05")
    assert not load_trained(run_dir).model.training
    export(run_dir, tmp_path / "out", None)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_dropout"] == 0.05


def test_a_pruned_run_has_a_rank_pattern(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path, "federation.num_rounds=6")
    trained = load_trained(run_dir)
    export(run_dir, tmp_path / "out", None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    live = {name.removeprefix("encoder."): n for name, n in trained.state.live_triplets.items()}
    assert set(config["target_modules"]) == {name for name, n in live.items() if n}
    assert config["rank_pattern"] == {name: n for name, n in live.items() if 0 < n < 4}
    assert config["rank_pattern"]
    for name, n in config["rank_pattern"].items():
        assert config["alpha_pattern"][name] / n == trained.state.adapter.scale
    assert set(lora_pairs(trained.adapted)) == {f"encoder.{name}" for name, n in live.items() if n}


def test_a_model_of_ours_is_refused(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path, "model.name=toy")
    with pytest.raises(InputError, match="'toy' is no transformers model"):
        export(run_dir, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no run\.json; allowed"):
        export(tmp_path, tmp_path / "out", None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no checkpoint\.safetensors; allowed"):
        export(tmp_path, tmp_path / "out", None)
    with pytest.raises(InputError, match="is not empty"):
        export(tmp_path, tmp_path, None)


def test_a_client_where_there_is_one_model_is_refused(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path, "method.name=lora")
    with pytest.raises(InputError, match="--client 1: lora has one model for all clients"):
        export(run_dir, tmp_path / "out", 1)
