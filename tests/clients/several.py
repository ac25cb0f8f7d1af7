"""One function per client. Run by the clients' Python: URL NAME. Prints what the client made of the answers as JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}

ASK = [{"role": "user", "content": "Tell me a story about a mouse."}]


def langchain(url: str) -> dict:
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key="none", max_tokens=20, temperature=0, seed=1)
    plain = OpenAI(model="demo", base_url=f"{url}/v1", api_key="none", max_tokens=8, temperature=0)
    return {
        "whole": chat.invoke("Tell me a story about a mouse.").content,
        "streamed": "".join(chunk.content for chunk in chat.stream("Tell me a story about a mouse.")),
        "plain": plain.invoke("Once upon a time"),
    }


def litellm(url: str) -> dict:
    import litellm

    options = {"model": "openai/demo", "api_base": f"{url}/v1", "api_key": "none", "messages": ASK, "max_tokens": 20}
    whole = litellm.completion(**options, temperature=0)
    streamed = litellm.completion(**options, temperature=0, stream=True)
    return {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
        "tokens": whole.usage.completion_tokens,
    }


def instructor(url: str) -> dict:
    import instructor
    import openai
    from pydantic import BaseModel, Field

    class Animal(BaseModel, extra="forbid"):  # else a small model adds fields until it is cut
        name: str = Field(max_length=10)
        legs: int = Field(ge=0, le=8)

    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA
    )
    options = {"model": "demo", "messages": ASK, "max_tokens": 100, "max_retries": 0}
    return client.chat.completions.create(response_model=Animal, **options).model_dump()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[2]](sys.argv[1])))
