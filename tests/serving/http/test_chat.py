"""The official client's chat: streamed and whole, and the shapes that it expects."""

from __future__ import annotations

ASK = [{"role": "user", "content": "Tell me about the sea."}]


def test_a_stream_is_the_whole_answer(server):
    client = server.client()
    whole = client.chat.completions.create(model="bundled", messages=ASK, max_tokens=24, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="bundled", messages=ASK, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
