"""S5: chat templates are programs that come with a checkpoint, and a client cannot send one."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError, InvalidRequest
from model.text.chat_template import ChatTemplate
from tests.faults.conftest import InProcess

pytestmark = pytest.mark.faults

CHAT = [{"role": "user", "content": "hi"}]
SELF_DOUBLING = "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}"

OUT_OF_THE_SANDBOX = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
CHANGES = [
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% do messages.pop() %}",
]
TOO_MUCH = [
    "{{ 'a' * (10 ** 11) }}",
    SELF_DOUBLING,
    "{{ '%9999999999d' % 1 }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ [0] * (10 ** 10) }}",
    "{{ ('a' * (3 * 10 ** 8)) | length }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'a' * (5 * 10 ** 6) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def template_of() -> Iterator[Callable[[str], ChatTemplate]]:
    made: list[ChatTemplate] = []

    def make(source: str) -> ChatTemplate:
        made.append(ChatTemplate(source, {}))
        return made[-1]

    yield make
    for template in made:
        template.close()


def is_refused(template: ChatTemplate, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        template.render(CHAT)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("source", OUT_OF_THE_SANDBOX)
def test_a_template_does_not_get_out_of_its_sandbox(template_of: Callable[[str], ChatTemplate], source: str) -> None:
    """In Jinja's plain environment, the third one runs a command."""
    text = ""
    with suppress(InvalidRequest):
        text = template_of(source).render(CHAT)
    assert text == "", "what is not safe is refused, or is not there"


@pytest.mark.parametrize("source", CHANGES)
def test_a_template_cannot_change_the_chat(template_of: Callable[[str], ChatTemplate], source: str) -> None:
    """In the sandbox that is not immutable, `append` works."""
    is_refused(template_of(source), "unsafe|unknown tag")


@pytest.mark.parametrize("source", TOO_MUCH)
def test_a_template_that_wants_too_much_is_stopped(template_of: Callable[[str], ChatTemplate], source: str) -> None:
    """In the service's own process, each of the first five takes all memory there is; the first does when compiled."""
    is_refused(template_of(source), "chat template")


def test_a_template_that_never_ends_is_ended_and_the_next_chat_is_served(
    template_of: Callable[[str], ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the service's own process, the two loops take hours, and the event loop with them."""
    template = template_of("{% if messages | length > 1 %}" + FOR_EVER + "{% endif %}fine")
    with pytest.raises(InvalidRequest, match="takes over 1 s"):
        template.render(CHAT * 2)
    assert template.render(CHAT) == "fine"


def test_a_process_that_was_killed_is_replaced(template_of: Callable[[str], ChatTemplate]) -> None:
    template = template_of("fine")
    assert template.render(CHAT) == "fine"
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    with pytest.raises(InvalidRequest):
        template.render(CHAT)
    assert template.render(CHAT) == "fine"


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a' * (10 ** 11) }}{% if %}"])
def test_a_template_that_does_not_compile_stops_the_start(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate.from_directory(tmp_path)


@pytest.mark.parametrize(
    "field", ["chat_template", "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "documents"]
)
async def test_a_template_that_a_client_sends_is_refused(in_process: Callable[..., InProcess], field: str) -> None:
    """CVE-2025-62426: a server that passes a client's arguments on to the template blocks its loop."""
    values: dict[str, Any] = {"chat_template": FOR_EVER, "chat_template_kwargs": {"tokenize": True}}
    body = json.dumps({"messages": CHAT, field: values.get(field, True)}).encode()
    answer = await in_process().post("/v1/chat/completions", body)
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"] == field
