"""Chat through the official client: streams, stop strings, log-probabilities, templates, tools, routing."""

from __future__ import annotations

import copy
import json
import math

import openai
import pytest

from moesaic.serving.http.stops import StopText
from moesaic.serving.http.tool_calls import ToolCalls
from moesaic.view import view

ASK = [{"role": "user", "content": "Tell me about the sea."}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "sea", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def templated(tiny):
    """The tiny model with a tokenizer that has a chat template and writes tool calls in tags."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = copy.deepcopy(tiny.model)
    model.config.max_position_embeddings = 400
    return model, tokenizer


def chat(server, **options):
    options = {"model": server.service.names[0], "messages": ASK, "max_tokens": 24, "temperature": 0, **options}
    return server.client().chat.completions.create(**options)


def joined(chunks, index=0):
    pieces = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
    return "".join(piece.delta.content or "" for piece in pieces)


def test_a_stream_is_the_whole_answer(server):
    whole = chat(server)
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 10, "it came in pieces"


def test_max_completion_tokens_is_the_newer_name(server):
    assert chat(server, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


def test_an_answer_ends_where_the_context_does(bundled, start):
    server = start(*bundled, max_context=32)
    answer = chat(server, max_tokens=openai.omit, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 32
    assert answer.choices[0].finish_reason == "length"


def test_n_and_seed(server):
    options = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    first, again = chat(server, **options), chat(server, **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 36
    chunks = list(chat(server, stream=True, **options))
    assert [joined(chunks, i) for i in range(3)] == texts
    assert chat(server, **{**options, "n": 1, "seed": 7}).choices[0].message.content == texts[2]
    assert chat(server, **{**options, "seed": 6}).choices[0].message.content == texts[1]


def test_unseeded_answers_differ(server):
    answers = {chat(server, temperature=1.5, max_tokens=16).choices[0].message.content for _ in range(3)}
    assert len(answers) == 3


def test_logprobs_are_the_models_own(server, bundled):
    answer = chat(server, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0.7, seed=1)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace") == answer.choices[0].message.content
    for token in content:
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-6
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5
    streamed = list(chat(server, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0.7, seed=1, stream=True))
    again = [token for c in streamed if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert again == content
    assert chat(server, max_tokens=2).choices[0].logprobs is None


def test_greedy_logprobs_by_value(server, bundled):
    import torch

    model, tokenizer = bundled
    answer = chat(server, logprobs=True, max_tokens=3)
    ids = tokenizer("user: Tell me about the sea.\nassistant:")["input_ids"]
    for token in answer.choices[0].logprobs.content:
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert token.logprob == pytest.approx(row.max().item(), abs=1e-4)
        ids.append(int(row.argmax()))


def test_a_stop_string_never_leaks(server):
    text = chat(server, max_tokens=40).choices[0].message.content
    for stop in (text[9:14], text[3:4], text[20:28]):
        expected = text[: text.index(stop)]
        answer = chat(server, max_tokens=40, stop=[stop, "never in it"])
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(chat(server, max_tokens=40, stop=stop, stream=True, logprobs=True))
        assert joined(chunks) == expected
        tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert len(b"".join(bytes(t.bytes) for t in tokens).decode("utf-8", "replace")) >= len(expected)
    assert chat(server, max_tokens=40, stop="never in it").choices[0].message.content == text


def test_stop_text_by_hand():
    stops = StopText(["<end>", "abab"])
    out = [stops.push(part) for part in ("he", "llo <e", "n", "t> a", "ba", "c", " ab")]
    assert out == ["he", "llo ", "", "<ent> ", "", "abac", " "]
    assert stops.flush() == "ab"
    stops = StopText(["xyz", "y"])
    assert [stops.push("ax"), stops.push("y"), stops.push("more")] == ["a", "x", ""]
    assert stops.stopped
    assert StopText(()).push("all") == "all"


def test_a_character_of_several_tokens_comes_whole(tiny, start, script):
    model, tokenizer = tiny
    text = "a નમસ્તે 🙂 b"
    script(model, tokenizer(text)["input_ids"])
    server = start(model, tokenizer)
    chunks = list(chat(server, max_tokens=40, stream=True, messages=[{"role": "user", "content": "x"}]))
    assert joined(chunks) == text
    assert "\ufffd" not in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].choices[0].finish_reason == "stop", "the end of text ended it"
    stopped = list(chat(server, max_tokens=40, stream=True, stop="🙂", messages=[{"role": "user", "content": "x"}]))
    assert joined(stopped) == "a નમસ્તે "


def test_without_a_template_messages_are_lines(server, bundled):
    tokenizer = bundled.tokenizer
    talk = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "Wet."}, *ASK]
    ids = server.service.prompts.chat([_message(m) for m in talk], None)
    assert tokenizer.decode(ids) == (
        "system: Be brief.\nuser: Tell me about the sea.\nassistant: Wet.\nuser: Tell me about the sea.\nassistant:"
    )
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        chat(server, tools=[TOOL])


def test_the_next_question_ends_an_answer_without_template(tiny, start, script):
    model, tokenizer = tiny
    script(model, tokenizer("It is wet.\nuser: and why")["input_ids"])
    answer = chat(start(model, tokenizer), max_tokens=50, messages=[{"role": "user", "content": "x"}])
    assert answer.choices[0].message.content == "It is wet."
    assert answer.choices[0].finish_reason == "stop"


def _message(fields):
    from moesaic.serving.http.schemas import Message

    return Message(**fields)


def test_the_tokenizers_template_is_used(templated, start):
    server = start(*templated)
    talk = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "sea", "arguments": '{"deep": true}'}}]},
        {"role": "tool", "content": "wet", "tool_call_id": "1"},
    ]  # fmt: skip
    ids = server.service.prompts.chat([_message(m) for m in talk], None)
    call = '<tool_call>{"name": "sea", "arguments": {"deep": true}}</tool_call>'
    assert templated[1].decode(ids) == f"[system]Be brief.[assistant]{call}[tool]wet[assistant]"
    with pytest.raises(openai.BadRequestError, match="template refused the messages: no"):
        chat(server, messages=[{"role": "tool", "content": "x"}])


def test_tools_go_through_the_template_and_calls_come_back(templated, start, script):
    model, tokenizer = templated
    said = 'Yes. <tool_call>\n{"name": "sea", "arguments": {"a": 1}}\n</tool_call>'
    server = start(model, tokenizer)
    script(model, tokenizer(said)["input_ids"])
    options = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100, "tools": [TOOL]}
    answer = chat(server, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Yes. "
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("sea", {"a": 1})
    chunks = [c.choices[0] for c in chat(server, stream=True, **options) if c.choices]
    assert "".join(c.delta.content or "" for c in chunks) == "Yes. "
    (streamed,) = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
    assert streamed.function.name == "sea"
    assert chunks[-1].finish_reason == "tool_calls"
    plain = chat(server, **{**options, "tool_choice": "none"}).choices[0]
    assert plain.message.content == said
    assert plain.finish_reason == "stop"


def test_tool_calls_by_hand():
    def run(*parts):
        calls = ToolCalls()
        said = [calls.push(part) for part in parts]
        return "".join(said), calls.finish()

    assert run("a <to", "ol> b") == ("a <tool> b", ("", []))
    said, (rest, calls) = run("x<tool_", 'call>{"name": "f"}</tool_call>', '<tool_call>{"name": "g", "arguments": {}}')
    assert (said, rest, [call["function"]["name"] for call in calls]) == ("x", "", ["f", "g"])
    assert run("<tool_call>{broken")[1] == ("<tool_call>{broken", [])


def test_routing_is_per_request(server, bundled):
    model, tokenizer = bundled
    import torch

    ids = tokenizer("user: Tell me about the sea.\nassistant:")["input_ids"]
    for routing in ({"k": 1}, {"without": [0, 1, 2, 3]}, {"k": {"0": 1}, "bias": {"3": [9.0] + [0.0] * 15}}):
        text = chat(server, extra_body={"routing": routing}).choices[0].message.content
        fields = {k: {int(l): x for l, x in v.items()} if isinstance(v, dict) else v for k, v in routing.items()}
        with view(model).policy(**fields):
            out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    with pytest.raises(openai.BadRequestError, match="cannot choose 17") as refused:
        chat(server, extra_body={"routing": {"k": 17}})
    assert refused.value.body["param"] == "routing"


def test_a_dense_model_is_served_and_has_no_routing(tiny_dense, start):
    from moesaic.view import load

    server = start(*load(tiny_dense, dense_ok=True))
    assert chat(server, messages=[{"role": "user", "content": "x"}], max_tokens=4).usage.completion_tokens <= 4
    with pytest.raises(openai.BadRequestError, match="dense"):
        chat(server, extra_body={"routing": {"k": 1}})


def test_penalties_and_bias(server, bundled):
    biased = chat(server, logit_bias={"100": 100}, max_tokens=6, extra_body={"ignore_eos": True})
    assert biased.choices[0].message.content == bundled.tokenizer.decode([100] * 6)
    spread = chat(server, logit_bias={"100": 100}, frequency_penalty=2, presence_penalty=2, max_tokens=60)
    assert spread.choices[0].message.content != bundled.tokenizer.decode([100] * 60)
    with pytest.raises(openai.BadRequestError, match="no token 99999"):
        chat(server, logit_bias={"99999": 1})
