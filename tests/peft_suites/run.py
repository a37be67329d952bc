"""Put grafts through PEFT's own tests of its methods: python tests/peft_suites/run.py [--peft-tests DIR].

PEFT's tests come with the source distribution of the installed version, which is downloaded with pip where no
directory is given. They are copied to a temporary directory and run there; `plugin.py` says what is run, and why the
rest is not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES = [
    "test_custom_models.py",
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_other.py",
    "test_seq_classifier.py",
    "test_target_parameters.py",
    "test_token_classification_qa.py",
    "test_tuners_utils.py",
    "test_vision_models.py",
]
# What PEFT's tests import on top of what this project needs.
NEEDED = ("datasets", "diffusers", "parameterized", "scipy")


def download(target: Path) -> Path:
    """Fetch the tests of the installed PEFT from its source distribution."""
    wanted = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
    subprocess.run([*command, "--dest", str(target), wanted], check=True)
    (archive,) = target.glob("peft-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.gz") / "tests"


def main(arguments: list[str] | None = None) -> int:
    """Run the suites and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other arguments go to pytest.")
    parser.add_argument("--peft-tests", type=Path, metavar="DIR", help="PEFT's tests; default: pip downloads them")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this file; may be repeated")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    options, rest = parser.parse_known_args(arguments)
    if options.peft_tests is not None and not (options.peft_tests / "testing_common.py").is_file():
        parser.error(f"--peft-tests must hold testing_common.py, got {str(options.peft_tests)!r}.")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(f"PEFT's tests need {', '.join(missing)}. Install with: pip install {' '.join(missing)}")
    from tiny_hub import fill  # only now: it imports torch

    with tempfile.TemporaryDirectory(prefix="peft-suites-") as name:
        room = Path(name)
        source = options.peft_tests or download(room)
        shutil.copytree(source, room / "run" / "tests", ignore=shutil.ignore_patterns("__pycache__", "conftest.py"))
        (room / "run" / "tests" / "__init__.py").touch()
        (room / "run" / "pytest.ini").write_text("[pytest]\naddopts =\n")
        fill(room / "home")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "HF_HOME": str(room / "home"),
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if options.report is not None:
            environment["PEFT_SUITES_REPORT"] = str(options.report.resolve())
        files = [f"tests/{suite}" for suite in options.suite or SUITES if (source / suite).is_file()]
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-q", "-rfE", "--tb=short", "--disable-warnings"]
        return subprocess.run([*command, *files, *rest], cwd=room / "run", env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
