"""A process of its own that talks to the Hub of hub_server.py, and the pipe over which tests ask it to.

The clients read HF_ENDPOINT and HF_HUB_OFFLINE once, when they are imported, so what is tested runs in a process whose
environment was set before. `Client` is the test's end; run as a script, this file is the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


class ClientError(Exception):
    """What a call raised over there: `kind` is the name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Client:
    """Starts the process and calls functions in it; a context manager.

    Attributes:
        warnings: What the last call warned of.
    """

    def __init__(self, endpoint: str, home: Path, token: str | None = None) -> None:
        home.mkdir()
        self.home, self.warnings, self._log = home, list[str](), home / "stderr.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        } | ({"HF_TOKEN": token} if token else {})
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, cwd=home,
            )  # fmt: skip

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def __call__(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Call a function below by its name; arguments and result travel as JSON.

        Raises:
            ClientError: It raised.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, args, kwargs], default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died: {self._log.read_text()}")
        answer = json.loads(line)
        self.warnings = answer["warnings"]
        if "error" in answer:
            raise ClientError(*answer["error"])
        return answer["result"]


# What follows runs in the other process.


def _base(name: str, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(name, **options)


def _logits(model: Any) -> list[list[float]]:
    from grafts import output
    from models import inputs, tiny_bert

    return output(model, inputs(tiny_bert())).tolist()


def graft_and_push(base: str, config: dict[str, Any], repo_id: str, **options: Any) -> dict[str, Any]:
    """Graft and `model.push_to_hub`."""
    from peft import get_peft_model

    from peft_graft import GraftConfig

    model = get_peft_model(_base(base), GraftConfig(task_type="SEQ_CLS", **config))
    info = model.push_to_hub(repo_id, **options)
    return {"oid": info.oid, "pr": info.pr_revision, "logits": _logits(model)}


def graft_and_save(base: str, config: dict[str, Any], directory: str) -> list[list[float]]:
    """Graft and `model.save_pretrained`."""
    from peft import get_peft_model

    from peft_graft import GraftConfig

    model = get_peft_model(_base(base), GraftConfig(task_type="SEQ_CLS", **config))
    model.save_pretrained(directory)
    return _logits(model)


def push(repo_id: str, directory: str, **options: Any) -> dict[str, Any]:
    """`peft_graft.push`."""
    import peft_graft

    info = peft_graft.push(repo_id, directory, **options)
    return {"oid": info.oid, "pr": info.pr_revision}


def files_verbs(base: str, donor: str, directory: str, token: str | None) -> list[int]:
    """Run the verbs that read the Hub, on a base and a donor there; return what each has counted."""
    import peft_graft

    out = Path(directory)
    options: dict[str, Any] = {"token": token, "overwrite": True}
    made = peft_graft.extract(base, donor, out / "skill", density=0.05, **options)
    merged = peft_graft.export(out / "skill", "checkpoint", out / "merged", **options)
    both = peft_graft.stitch([out / "skill"], out / "both", **options)
    return [made.entries, merged.carried, both.entries, peft_graft.diff(base, donor, token=token).total.entries]


def inspect(adapter: str, token: str | None) -> int:
    """`peft_graft.inspect`."""
    import peft_graft

    return peft_graft.inspect(adapter, token=token).entries


def train_and_push(base: str, config: dict[str, Any], repo_id: str, directory: str, **options: Any) -> None:
    """Train a mask with a Trainer that pushes its checkpoints, and `Trainer.push_to_hub`."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from models import inputs, tiny_bert
    from peft_graft import GraftConfig

    batch = inputs(tiny_bert())
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    model = get_peft_model(_base(base), GraftConfig(task_type="SEQ_CLS", selection="learned", **config))
    arguments = TrainingArguments(
        directory, max_steps=2, save_steps=1, push_to_hub=True, hub_model_id=repo_id, report_to="none", use_cpu=True,
        per_device_train_batch_size=3, average_tokens_across_devices=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub(**options)


def load(base: str, repo_id: str, base_options: dict[str, Any] | None = None, **options: Any) -> list[list[float]]:
    """`PeftModel.from_pretrained`."""
    from peft import PeftModel

    import peft_graft  # noqa: F401 - registers the method

    return _logits(PeftModel.from_pretrained(_base(base, **(base_options or {})), repo_id, **options))


def load_auto(repo_id: str, **options: Any) -> list[list[float]]:
    """`AutoPeftModelForSequenceClassification.from_pretrained`."""
    from peft import AutoPeftModelForSequenceClassification

    import peft_graft  # noqa: F401 - registers the method

    return _logits(AutoPeftModelForSequenceClassification.from_pretrained(repo_id, **options))


def load_second(base: str, first: str, second: str, **options: Any) -> list[list[float]]:
    """`model.load_adapter` and `set_adapter`."""
    from peft import PeftModel

    import peft_graft  # noqa: F401 - registers the method

    model = PeftModel.from_pretrained(_base(base), first)
    model.load_adapter(second, "other", **options)
    model.set_adapter("other")
    return _logits(model)


def run(code: str) -> list[list[float]]:
    """Run a card's snippet, which makes a `model`."""
    names: dict[str, Any] = {}
    exec(code, names)
    return _logits(names["model"])


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    import torch
    from transformers import Trainer  # noqa: F401 - all that takes time, while the other client starts too

    import peft_graft  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        name, args, kwargs = json.loads(line)
        answer: dict[str, Any] = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer["result"] = globals()[name](*args, **kwargs)
            except Exception as error:  # the other process decides
                answer["error"] = [type(error).__name__, str(error)]
        answer["warnings"] = [str(one.message) for one in caught if one.category is UserWarning]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS)]
    _serve()
