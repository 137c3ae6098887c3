"""Names of files: what a model folder is made of, and what runs code and no artifact holds."""

from __future__ import annotations

# of a model on the Hub: what is downloaded, and what an artifact takes
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
PICKLE_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
    "consolidated.00.pth",
)
# no artifact of ours has such a file
RUNS_CODE = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth")
