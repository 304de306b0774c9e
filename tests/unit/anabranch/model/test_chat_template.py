"""Chat templates that come with a model: what they refuse is the client's to mend, what they break is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers

from anabranch.errors import AnabranchError, ChatTemplateError, InvalidRequest
from anabranch.model.sources import ModelSource
from anabranch.model.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = tokenizers.models.WordLevel({"<eos>": 0, "hello": 1}, unk_token="<eos>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def rendered(folder: Path, template: str, messages: list[dict[str, str]] = MESSAGES) -> str:
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(ModelSource(name="x", path=folder, kind="folder")).render_chat(messages)


def test_a_template_that_works(folder) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    assert rendered(folder, template) == "user: hello<eos>"


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            InvalidRequest,
            "messages: .* refuses them: roles must alter",
        ),
        ("{{ 1/0 }}", ChatTemplateError, "chat template failed: ZeroDivisionError: division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", ChatTemplateError, "failed: RecursionError"),
        ("{% for x in range(10**8) %}{% endfor %}", ChatTemplateError, "failed: OverflowError: Range too big"),
        ("{{ messages[0].content.nothing.more }}", ChatTemplateError, "failed: UndefinedError"),
        ("{{ messages[5].content + 1 }}", ChatTemplateError, "failed: UndefinedError"),
        ("{{ messages[0].content + 1 }}", ChatTemplateError, "failed: TypeError"),
        ("{{ 'x'.nothing() }}", ChatTemplateError, "failed: UndefinedError"),
        ("{% if %}", ChatTemplateError, "failed: TemplateSyntaxError"),
        ("{% include 'secret' %}", ChatTemplateError, "failed: TypeError: no loader"),
        ("{{ ''.__class__.__mro__ }}", ChatTemplateError, "failed: SecurityError"),
        ("{{ raise_exception('x' * 10000) }}", InvalidRequest, "x{500}$"),
    ],
)
def test_what_fails_is_named(folder, template: str, error: type[AnabranchError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        rendered(folder, template)
    assert type(caught.value) is error
