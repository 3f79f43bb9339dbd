"""The examples of docs/serve.md do what the page says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
HERE = "http://127.0.0.1:8000"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_examples(server):
    (script,) = [block for block in blocks("sh") if "curl" in block]
    commands = re.findall(r"^curl .*?(?=^curl |\Z)", script, re.DOTALL | re.MULTILINE)
    assert len(commands) == 4
    outputs = []
    for command in commands:
        command = command.replace("curl ", "curl -sS --fail-with-body ", 1).replace(HERE, server.url)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert json.loads(outputs[0])["choices"][0]["message"]["content"]
    assert outputs[1].rstrip().endswith("data: [DONE]")
    assert json.loads(outputs[2])["data"][0]["id"] == "bundled"
    assert "moesaic_completion_tokens_total" in outputs[3]


def test_the_client_example(server, capsys):
    (code,) = [block for block in blocks("python") if "OpenAI" in block]
    exec(compile(code.replace(HERE, server.url), "serve.md", "exec"), {})
    assert "CompletionUsage(completion_tokens=40" in capsys.readouterr().out


def test_the_python_example(tiny):
    (code,) = [block for block in blocks("python") if "Engine" in block]
    assert "serve(Server(" in code
    scope = {"model": tiny.model, "tokenizer": tiny.tokenizer}
    exec(compile(code.replace("serve(Server(", "made = (Server(").replace("8000", "0"), "serve.md", "exec"), scope)
    server, bound = scope["made"]
    assert server.engine.max_rows == 16
    bound.close()


def test_every_field_of_a_request_is_in_the_page():
    from moesaic.serving.http.schemas import ChatRequest, CompletionRequest, Routing

    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *Routing.model_fields}
    ignored = {"user", "metadata", "parallel_tool_calls"}
    known = {"model", "messages", "prompt", "response_format"}
    missing = [name for name in sorted(fields - ignored - known) if not re.search(rf"`{name}[`.]", PAGE)]
    assert not missing


def test_every_limit_is_an_option():
    import inspect

    from moesaic.cli.serve import serve

    options = {"--" + name.replace("_", "-"): p.default for name, p in inspect.signature(serve).parameters.items()}
    limits = re.findall(r"\| `(--[a-z-]+)` \| ([\d.]+)", PAGE.split("## Limits")[1])
    assert len(limits) == 6
    for option, default in limits:
        shown = float(default) * ((1 << 20) if option == "--max-body" else 1)
        assert options[option] == shown, option
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= options.keys()


def test_every_metric_named_is_there(server):
    import httpx

    text = httpx.get(server.url + "/metrics").text
    for name in re.findall(r"`(moesaic_\w+)`", PAGE):
        assert name in text, name
