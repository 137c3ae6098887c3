"""vLLM beside this project's own scoring. No vLLM is installed here: what stands in for it scores
with transformers.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from few import few
from here import here, result_in
from make_assess_models import byte_tokenizer, saved, tiny
from reports import whole_report
from test_run import TINY

from pipeline.data.documents import Document
from pipeline.errors import Preempted
from pipeline.evaluation.serving import vllm_check
from pipeline.evaluation.serving.vllm_check import Checked, check_vllm, installed, why_not
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task

FAKE = '''
"""Stands in for vLLM: real figures by transformers, from the folder alone; or as FAKE_VLLM says."""
import json, os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

how = os.environ.get("FAKE_VLLM", "honest")

class SamplingParams:
    def __init__(self, *, max_tokens, temperature, prompt_logprobs, detokenize):
        assert (max_tokens, prompt_logprobs) == (1, 0)

class LLM:
    def __init__(self, model, *, dtype, enforce_eager, max_num_seqs, max_model_len):
        assert "pipeline" not in sys.modules and dtype == "auto"
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        if how == "crash":
            raise ValueError("Unknown quantization method: torchao")
        if how == "hang":
            child = subprocess.Popen(["sleep", "300"])
            Path(model, "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(300)
        if how == "silent":
            os._exit(0)
        self.folder, self.longest = model, max_model_len

    def generate(self, prompts, params, use_tqdm):
        if how == "nan":
            return [
                self.output(prompt["prompt_token_ids"], [float("nan")] * self.longest)
                for prompt in prompts
            ]
        import torch, transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder).bfloat16().eval()
        if how == "disagree":
            model.model.layers[0].mlp.down_proj.weight.data.mul_(30)
        print("chatter on stdout")
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            assert len(ids) < self.longest
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            taken = [logprobs[at, token].item() for at, token in enumerate(ids[1:])]
            outputs.append(self.output(ids, taken))
        return outputs

    def output(self, ids, logprobs):
        places = [{t: SimpleNamespace(logprob=each)} for t, each in zip(ids[1:], logprobs)]
        return SimpleNamespace(prompt_logprobs=[None, *places])
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have this process and those that it starts find a vLLM for CPUs."""
    folder = tmp_path / "site"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm/__init__.py").write_text(FAKE)
    info = folder / "vllm-0.99.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0+cpu\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return saved(tiny(Task.causal_lm), tmp_path / "model")


def ask(folder: Path, clock: PhaseClock | None = None, **more: Any) -> Checked:
    documents = [Document(text=f"document {place} says {'more ' * place}") for place in range(12)]
    return check_vllm(
        folder,
        documents=documents,
        task=Task.causal_lm,
        sequence_length=48,
        device=torch.device("cpu"),
        clock=clock or PhaseClock(),
        **more,
    )


def test_where_it_is_not_installed_the_check_says_so(artifact: Path) -> None:
    assert installed() is None
    checked = ask(artifact)
    assert checked.say() == "vLLM: not run here (vLLM is not installed)"
    assert checked.to_json()["outcome"] == "not run here"


@pytest.mark.slow
def test_its_mean_is_set_beside_our_own_on_the_same_tokens(artifact: Path, fake: Path) -> None:
    clock = PhaseClock()
    checked = ask(artifact, clock)
    assert (checked.outcome, checked.agrees, checked.documents, checked.version) == (
        "ran",
        True,
        8,
        "0.99.0+cpu",
    )
    assert checked.vllm is not None
    assert checked.here is not None
    assert 0 < abs(checked.vllm - checked.here) < 0.01  # bf16, and not the same code
    model, ids = tiny(Task.causal_lm).eval().requires_grad_(False), []
    for text in sorted(
        (Document(text=f"document {at} says {'more ' * at}") for at in range(12)),
        key=lambda document: document.digest,
    )[:8]:
        # begins, ends
        ids.append(torch.tensor([[1, *byte_tokenizer()(text.text)["input_ids"], 2][:48]]))
    by_hand = [
        model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])
        for row in ids
    ]
    assert checked.tokens == sum(len(each) for each in by_hand)
    assert checked.here == pytest.approx(torch.cat(by_hand).mean().item(), abs=1e-4)
    assert checked.say().startswith("vLLM: ran (0.99.0+cpu: -")
    assert Checked.from_json(json.loads(json.dumps(checked.to_json()))) == checked
    assert clock.mark()[1]["eval"] > 0.5e9  # its time is ours to pay


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("crash", "vLLM: failed (ValueError: Unknown quantization method: torchao)"),
        ("silent", "vLLM: failed (it ended without an answer)"),
        ("nan", "vLLM: failed (log-probabilities are not finite)"),
    ],
)
def test_what_it_cannot_do_is_told(
    how: str, said: str, artifact: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", how)
    checked = ask(artifact)
    assert checked.say() == said
    assert checked.agrees is None


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody has waited for has)."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("wanted", few([True, False], 1))
def test_what_hangs_is_ended_with_all_that_it_started(
    wanted: bool, artifact: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    monkeypatch.setattr(vllm_check, "TIMEOUT_S", 300 if wanted else 3)

    def preempted() -> None:
        if wanted and (artifact / "pids").exists():
            raise Preempted("the machine is wanted back")

    if wanted:
        with pytest.raises(Preempted):
            ask(artifact, still=preempted)
    else:
        assert ask(artifact, still=preempted).say() == "vLLM: failed (no answer within 3 s)"
    pids = [int(pid) for pid in (artifact / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


@pytest.mark.parametrize(
    ("version", "task", "device", "quantized", "said"),
    [
        (None, "causal_lm", "cuda", None, "vLLM is not installed"),
        (
            "0.11.0",
            "sequence_classification",
            "cuda",
            None,
            "on language models, not on sequence_classification",
        ),
        ("0.11.0", "causal_lm", "cpu", None, "vLLM 0.11.0 needs CUDA, and this run is on cpu"),
        ("0.11.0+cpu", "causal_lm", "cpu", "bitsandbytes", "vLLM takes bitsandbytes on CUDA alone"),
        ("0.11.0+cpu", "causal_lm", "cpu", None, None),
        ("0.11.0", "causal_lm", "cuda", "bitsandbytes", None),
        ("0.11.0", "causal_lm", "cuda", None, None),
    ],
)
def test_where_it_is_worth_trying(
    version: str | None,
    task: str,
    device: str,
    quantized: str | None,
    said: str | None,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((artifact / "config.json").read_text())
    if quantized is not None:
        config["quantization_config"] = {"quant_method": quantized, "load_in_8bit": True}
        (artifact / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(vllm_check, "installed", lambda: version)
    found = why_not(artifact, Task(task), SimpleNamespace(type=device))  # type: ignore[arg-type]
    assert (found is None) if said is None else said in str(found)


def test_a_model_is_shown_its_own_device_and_what_is_free_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device: Any = SimpleNamespace(type="cuda", index=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert device_of(device).alone_in_environment() == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device_of(device).alone_in_environment() == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**30, 80 * 2**30))
    assert vllm_check._room(device) == {"gpu_memory_utilization": 0.4}
    assert (
        vllm_check._room(torch.device("cpu"))
        == device_of(torch.device("cpu")).alone_in_environment()
        == {}
    )


# -- in a run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_tells_it_charges_it_and_ends_with_3_where_it_disagrees(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"text": f"document {place} of a small set, long enough to be one"} for place in range(120)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["recipe=baseline", *TINY, "data.path=texts.jsonl", "tracking.mlflow=false"]
    assert here(tmp_path, *command).returncode == 0
    first = result_in(tmp_path)
    assert "vLLM" not in json.dumps(first["environment"])  # of a quantized arm it would
    every = [*command, "serving.check_vllm=every"]
    done = here(tmp_path, *every)
    assert done.returncode == 0, done.stderr
    result, manifest = result_in(tmp_path), checked_in(tmp_path)
    line = (
        f"baseline: vLLM: ran ({manifest['version']}: {manifest['vllm']:.4f} nats a token,"
        f" {manifest['here']:.4f} here"
    )
    assert line in done.stdout
    assert line in " ".join(result["environment"]["notes"])
    assert manifest["agrees"] is True
    assert line in whole_report(tmp_path / "mlruns/latest").replace("\\", "")
    spent = result["run"]["device_hours"]
    assert (
        spent["work"]["value"] == 0 < spent["assess"]["value"]
    )  # assessed anew, nothing is trained again
    done = here(tmp_path, *every)
    assert (done.returncode, line in done.stdout) == (0, True)
    assert result_in(tmp_path)["run"]["device_hours"]["assess"]["value"] == 0

    monkeypatch.setenv("FAKE_VLLM", "disagree")
    (fake / "vllm-0.99.0+cpu.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.1+cpu\n"
    )
    for _ in range(2):  # made, and found again
        done = here(tmp_path, *every)
        assert done.returncode == 3, done.stderr
        assert (
            "vLLM disagrees: baseline: it reads another model from the same folder" in done.stderr
        )
        assert "vLLM: ran (0.99.1+cpu: DISAGREES: " in done.stdout
        assert "DISAGREES" in whole_report(tmp_path / "mlruns/latest")
    assert checked_in(tmp_path)["agrees"] is False
    assert here(tmp_path, *command, "serving.check_vllm=never").returncode == 0


def checked_in(cwd: Path) -> dict[str, Any]:
    """Return what artifact.json says of the check."""
    folder = Path(result_in(cwd)["rows"][-1]["artifact"]["path"])
    return json.loads((folder / "artifact.json").read_text())["checked"]["vllm"]
