"""The format of the prompts as a chat template, with which other programs write them."""

import json
from functools import partial

# A JSON string is a literal of Jinja too, except for a character that JSON writes as two escapes, such as an emoji.
_literal = partial(json.dumps, ensure_ascii=False)

FIRST_LINE = '{%- set question = (messages | selectattr("role", "equalto", "user") | list | last).content -%}'


def parts_of(template: str, in_chat: bool = False) -> tuple[str, str, str]:
    """Return the text of a template before its references, that after them, and the white space before the answer.

    In GPT-2's vocabulary the token of a word contains the space before it, so that space is part of the answer. The
    line break before an answer is part of a chat template.
    """
    before, after = template.removesuffix("{answer}").split("{references}")
    end = after.rstrip(" " if in_chat else None)
    return before, end, after[len(end) :]


def as_chat_template(template: str, in_chat: bool = False) -> str:
    """Return a chat template (in Jinja) that writes the prompts of a template.

    The last message of the user is the question. The references are the `documents` of `apply_chat_template`,
    `{"title": "", "text": TEXT}` each, whose titles are left out, as are other messages. An answer may follow, with the
    end-of-text token.

    Args:
        template: Text with `{references}`, `{question}` and, at its end, `{answer}`.
        in_chat: Whether it has the messages of another chat template, see `prompts.in_chat_template`.
    """
    before, after, answer_start = parts_of(template, in_chat)
    return "\n".join(
        (
            FIRST_LINE,
            f"{{{{- {_literal(before)} | replace('{{question}}', question) -}}}}",
            "{%- for document in documents or [] -%}",
            '{{- "[" ~ loop.index ~ "] " ~ (document.text.split() | join(" ")) ~ "\\n" -}}',
            "{%- endfor -%}",
            f"{{{{- {_literal(after)} | replace('{{question}}', question) -}}}}",
            '{%- if messages[-1].role == "assistant" -%}',
            f"{{{{- {_literal(answer_start)} ~ messages[-1].content.strip() ~ eos_token -}}}}",
            "{%- endif -%}",
        )
    )
