"""What the process of the vLLM check runs: load a folder with vLLM, and tell how likely it finds
given tokens.

Run by its path, this file imports vLLM and nothing of this package: the folder is to be read as it
would be for anyone. The request is a JSON file; the answer goes to the file that it names, because
vLLM writes to stdout.
Source: vLLM's `LLM`, `SamplingParams.prompt_logprobs` (0: of the prompt's own tokens) and
`RequestOutput.prompt_logprobs` (None, then by position a Logprob by token), docs.vllm.ai.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict


class Request(TypedDict):
    """What this program is asked; `more` goes to vLLM, and the answer to the file `answer`."""

    folder: str
    prompts: list[list[int]]
    answer: str
    more: dict[str, Any]


def log_likelihoods(request: Request) -> list[list[float]]:
    """Return natural log-probabilities of each prompt's tokens but the first, as vLLM gives
    them.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    prompts = request["prompts"]
    model: Any = LLM(
        model=request["folder"],
        dtype="auto",
        enforce_eager=True,
        max_num_seqs=len(prompts),
        max_model_len=max(map(len, prompts)) + 1,
        **request["more"],
    )
    params: Any = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        [
            float(place[token].logprob)
            for token, place in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for ids, output in zip(prompts, outputs, strict=True)
    ]


if __name__ == "__main__":
    asked: Request = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["answer"]).write_text(json.dumps(log_likelihoods(asked)))
