"""The command: it writes a new folder, or says in one line why it does not."""

from tests.tools.environment import run, shared


def test_the_command(tmp_path):
    out = tmp_path / "out"
    model = shared("golden/qwen2-siglip-linear")
    done = run("export.py", "--model", model, "--to", "tinyllava", out)
    assert "model.safetensors" in done.stdout and (out / "config.json").exists()
    again = run("export.py", "--model", model, "--to", "tinyllava", out, ok=False)
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: {out}: exists; fix: ")
    refused = run("export.py", "--model", model, "--to", "hf-llava", tmp_path / "hf", ok=False)
    assert "two-layer MLP" in refused.stderr.splitlines()[-1]
