"""Messages, and a tokenizer of which each token is a character, so that texts can be read back."""

from __future__ import annotations

SHOWN = (  # everything that a message holds, as JSON, so that a null too many would show
    "{% for m in messages %}<{{ m.role }}> {{ m | tojson }} {{ tools | tojson }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


def words(template=SHOWN):
    from transformers import AutoTokenizer

    from fastpref.cli.demo import ASSETS

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
