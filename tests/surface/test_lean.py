import json
import subprocess
import sys

HEAVY = (
    "transformers", "datasets", "accelerate", "onnx", "onnxruntime", "sklearn", "typer", "rich", "PIL", "pandas",
    "fastapi", "matplotlib", "torch._dynamo", "torch._inductor",
)  # fmt: skip


def after(code: str) -> dict[str, object]:
    """What a fresh process has loaded and done after the code."""
    script = f"""
import json, logging, sys
{code}
torch = sys.modules.get("torch")
print(json.dumps({{
    "loaded": sorted(m for m in {HEAVY!r} if m in sys.modules),
    "torch": torch is not None,
    "cuda": bool(torch and torch.cuda.is_initialized()),
    "handlers": len(logging.getLogger().handlers) + len(logging.getLogger("offramp").handlers),
    "callable": [callable(getattr(sys.modules["offramp"], n)) for n in ("attach", "train", "compare", "calibrate")]
                if torch else [],
}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_offramp_imports_nothing_heavy() -> None:
    seen = after("import offramp")
    assert seen == {"loaded": [], "torch": False, "cuda": False, "handlers": 0, "callable": []}


def test_using_every_public_name_stays_lean() -> None:
    seen = after("from offramp import *")
    assert seen == {"loaded": [], "torch": True, "cuda": False, "handlers": 0, "callable": [True] * 4}


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    seen = after("import offramp.train, offramp.attach, offramp.calibrate.eenet\nimport offramp.compare")
    assert seen["callable"] == [True] * 4
    assert seen["loaded"] == []


def test_the_command_line_loads_torch_only_to_run_a_command() -> None:
    assert after("import offramp.cli")["torch"] is False
