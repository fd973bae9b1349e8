"""The format of the prompts as a chat template, with which other programs write them."""

import json
from functools import partial

# A JSON string is a literal of Jinja too, except for a character that JSON writes as two escapes, such as an emoji.
_literal = partial(json.dumps, ensure_ascii=False)


def as_chat_template(template: str) -> str:
    """Return a chat template (in Jinja) that writes the prompts of a template.

    The last message of the user is the question. The references are the `documents` of `apply_chat_template`,
    `{"title": "", "text": TEXT}` each, whose titles are left out, as are other messages. An answer may follow, with the
    end-of-text token.

    Args:
        template: Text with `{references}`, `{question}` and, at its end, `{answer}`.
    """
    before, after = template.removesuffix("{answer}").split("{references}")
    end = after.rstrip()
    return "\n".join(
        (
            '{%- set question = (messages | selectattr("role", "equalto", "user") | list | last).content -%}',
            f"{{{{- {_literal(before)} | replace('{{question}}', question) -}}}}",
            "{%- for document in documents or [] -%}",
            '{{- "[" ~ loop.index ~ "] " ~ (document.text.split() | join(" ")) ~ "\\n" -}}',
            "{%- endfor -%}",
            f"{{{{- {_literal(end)} | replace('{{question}}', question) -}}}}",
            '{%- if messages[-1].role == "assistant" -%}',
            f"{{{{- {_literal(after[len(end) :])} ~ messages[-1].content.strip() ~ eos_token -}}}}",
            "{%- endif -%}",
        )
    )
