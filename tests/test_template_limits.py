"""A template is data of a stranger: whatever it asks for, it ends soon, in one sentence, and takes little memory."""

# ruff: noqa: E501 (templates have long lines)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from melt_runtime.errors import MeltError, PackageError
from melt_runtime.text.templating.chat_template import ChatTemplate

# A tree or a text that doubles sixty times.
LISTS = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
TUPLES = "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}"
MILLION = "('a' * 1000000)"
HOSTILE = {
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of a list": "{{ [1] * 10**10 }}",
    "power": "{{ 10**(10**8) }}",
    "power of a float": "{{ 2.0 ** 100000 }}",
    "product": "{{ (10**18) * (10**18) }}",
    "whole numbers from text": "{{ ('f' * 1000000) | int(0, 16) }}",
    "bytes of a number": "{{ (5).to_bytes(10**10, 'big') }}",
    "nested ranges": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested ranges with text": "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}",
    "a condition of a loop": "{% for x in range(100000) if range(100000) | sum %}{% endfor %}",
    "a loop within itself": "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "center, the filter": "{{ 'a' | center(10**10) }}",
    "center, the method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "indent by text": "{{ ('\n' * 1000000) | indent('a' * 1000000) }}",
    "a width in percent": "{{ '%1000000000d' % 1 }}",
    "a width among the arguments": "{{ '%*d' % (1000000000, 1) }}",
    "a width after a name with brackets": "{{ '%(a())1000000000d' % {'a()': 1} }}",
    "names without an end": "{{ ('%(' * 10000000) % {'a': 1} }}",
    "flags without an end": "{{ ('%' + '0' * 20000000) % 1 }}",
    "a width in the filter": "{{ '%1000000000d' | format(1) }}",
    "a width in format": "{{ '{:1000000000}'.format(1) }}",
    "a width for format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a width in markup": "{{ ('{:1000000000}' | safe).format(1) }}",
    "one text many times by format": "{{ ('{a}' * 100000).format(a='b' * 100000) }}",
    "one text many times by percent": "{{ ('%(a)s' * 100000) % {'a': 'b' * 100000} }}",
    "one text many times by format_map": "{{ ('{a}' * 100000).format_map({'a': 'b' * 100000}) }}",
    "a text that doubles": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "a text that doubles by ~": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "a tree that doubles, shown": LISTS + "{{ ns.a }}",
    "a tree that doubles, as JSON": LISTS + "{{ ns.a | tojson }}",
    "a tree that doubles, compared": LISTS + "{{ ns.a == ns.b }}",
    "a tree that doubles, sought": LISTS + "{{ [ns.a].index(ns.b) }}",
    "a tree that doubles, tested": LISTS + "{{ ns.a is eq ns.b }}",
    "a tree that doubles, joined": LISTS + "{{ 'a' ~ ns.a }}",
    "a tree that doubles, in percent": LISTS + "{{ '%s' % [ns.a] }}",
    "a key that doubles": TUPLES + "{{ {ns.a: 1} }}",
    "a key that doubles, looked up": TUPLES + "{{ {}[ns.a] }}",
    "a key that doubles, asked for": TUPLES + "{{ {}.get(ns.a) }}",
    "a key that doubles, unique": TUPLES + "{{ [ns.a] | map('default') | unique | list }}",
    "a macro that doubles": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "lists that are kept": "{% set ns = namespace() %}{% for i in range(100000) %}{% for j in range(1000) %}{% set ns.a = [ns.a, {}, {}, {}, {}] %}{% endfor %}{% endfor %}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ range(10) | slice(10**10) | list }}",
    "round": "{{ 1 | round(10**9, 'ceil') }}",
    "sum of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "replace": f"{{{{ {MILLION}.replace('a', 'b' * 1000000) }}}}",
    "replace, the filter": f"{{{{ {MILLION} | replace('', 'b' * 1000000) }}}}",
    "join": f"{{{{ ([{MILLION}] * 100000) | join }}}}",
    "join by": f"{{{{ range(100000) | join({MILLION}) }}}}",
    "join, the method": f"{{{{ {MILLION}.join('b' * 1000000) }}}}",
    "translate": f"{{{{ {MILLION}.translate({{97: 'b' * 1000000}}) }}}}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(100000) }}",
    "a slow encoding": "{{ ('ab' * 500000).encode('punycode') }}",
    "a search from the end": "{{ ('a' * 30000000).rfind('a' * 15000000 + 'b') }}",
    "split": "{{ ('a' * 30000000).split('a') }}",
    "indented JSON": "{{ [1] | tojson(indent=10**9) }}",
    "separated JSON": f"{{{{ range(100000) | list | tojson(separators=({MILLION}, '')) }}}}",
    "wordwrap": "{{ ('a' * 10000000) | wordwrap(1) }}",
    "striptags": "{{ ('<!--' * 1000000 + '-->') | striptags }}",
    "filters on filters, never read": "{% set ns = namespace(a=[1]) %}{% for i in range(100000) %}{% set ns.a = ns.a | select %}{% endfor %}",
    "filters on filters": "{% set ns = namespace(a=[1]) %}{% for i in range(100000) %}{% set ns.a = ns.a | map('string') %}{% endfor %}{{ ns.a | list }}",
    "filters on filters in lists": "{% set ns = namespace(a=[1]) %}{% for i in range(100000) %}{% set ns.a = [ns.a] | map('first') %}{% endfor %}{{ ns.a | list }}",
    "a long attribute": "{{ range(100000) | map(attribute='real.' * 100000 ~ 'real') | list }}",
    "many attributes": "{{ range(100000) | sort(false, false, 'real,' * 100000 ~ 'real') }}",
    "a range searched": "{% for i in range(100000) %}{{ range(100000).count(1.5) }}{% endfor %}",
    "arguments of a macro": "{% macro f() %}{% endmacro %}{% for i in range(100000) %}{{ f(*range(100000)) }}{% endfor %}",
    "title": "{{ ('aa ' * 20000000) | title }}",
    "wordcount": "{{ ('aa ' * 20000000) | wordcount }}",
    "words without tags": "{{ ('aa ' * 20000000) | striptags }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "a long date": "{{ strftime_now('%Y' * 1000000) }}",
    "many texts by map": "{{ range(100000) | map('string') | map('center', 1000) | join }}",
    "text in a loop": "{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}",
    "text in a block": "{% set x %}{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "an option that is folded": "{% autoescape 'a' | center(10**10) %}{% endautoescape %}",
    "brackets": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "lists in lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "a long sum": "{{ " + "+".join(["1"] * 5000) + " }}",
    "signs": "{{ " + "-" * 5000 + "1 }}",
    "filters": "{{ x" + " | list" * 5000 + " }}",
    "attributes": "{{ x" + ".a" * 5000 + " }}",
    "ifs": "{% if x %}" * 200 + "{% endif %}" * 200,
    "loops": "{% for x in y %}" * 50 + "{% endfor %}" * 50,
    "digits": "{{ " + "9" * 5000 + " }}",
    "hexadecimal digits": "{{ 0x" + "f" * 50_000 + " }}",
    "many expressions": "{{ 'a'" + " ~ 'a'" * 30_000 + " }}",
    "too long": " " * 300_000,
    "braces": "{" * 100_000,
    "a comment without an end": "{#" * 50_000,
    "another file": "{% include '/etc/passwd' %}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "a class by format": "{{ '{0.__class__}'.format('') }}{{ 1 + 'a' }}",
    "a generator's own methods": "{{ (range(5) | map('string')).send(1) }}",
    "a name of Python's": "{{ namespace(__class__=1) }}",
}
PROGRAM = """
import json, resource, sys
from melt_runtime.errors import MeltError
from melt_runtime.text.templating.chat_template import ChatTemplate

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # of addresses; what is used is measured below
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = ["ok", str(len(ChatTemplate(json.load(sys.stdin)).render({"messages": [{"role": "user", "content": "hi"}]})))]
except MeltError as error:
    said = [type(error).__name__, str(error)]
print(json.dumps([*said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_fails_in_one_sentence(name: str) -> None:
    with pytest.raises(PackageError) as caught:
        ChatTemplate(HOSTILE[name]).render({"messages": [{"role": "user", "content": "hi"}]})
    sentence = str(caught.value)
    assert sentence.startswith("The chat template")
    assert sentence.count("\n") == 0
    assert len(sentence) < 500


@pytest.mark.parametrize(
    "name",
    [
        "nested ranges",
        "lists that are kept",
        "a tree that doubles, shown",
        "split",
        "repetition",
        "title",
        "filters on filters",
    ],
)
def test_a_hostile_template_takes_little_memory(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(HOSTILE[name]), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    kind, _, kilobytes = json.loads(result.stdout)
    assert kind == "PackageError"
    assert kilobytes < 400 << 10


def test_a_long_conversation_is_no_attack() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if '</think>' in m.content %}{% set c = m.content.split('</think>')[-1] | trim %}"
        "{% else %}{% set c = m.content | trim %}{% endif %}{{ '<' + m.role + '>' + c + '</>' }}"
        "{% if loop.index0 < messages | length - 1 and messages[loop.index0 + 1].role == m.role %}{{ 'again' }}{% endif %}"
        "{% endfor %}"
    )
    for count, size in ((5_000, 200), (20, 200_000)):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": f"a</think>{'word ' * (size // 5)}"} for i in range(count)
        ]
        assert len(template.render({"messages": messages})) > count * (size - 10)


def test_filters_on_filters_are_no_attack_where_people_write_them() -> None:
    template = ChatTemplate(
        "{{ messages | selectattr('role', 'equalto', 'user') | rejectattr('hidden') | map(attribute='content.text')"
        " | select | map('trim') | map('title') | unique | list | join('%') }}{{ '%(a)5s%%%-5s|' | format('b') if x"
        " else '%(a)5s|%%(' % {'a': 1} }}"
    )
    messages = [{"role": "user", "content": {"text": " some words "}}, {"role": "assistant", "content": "x"}]
    assert template.render({"messages": messages}) == "Some Words    1|%("


def test_limits_hold_for_each_rendering_and_not_for_all_together() -> None:
    template = ChatTemplate("{% for i in range(50000) %}{{ messages[0].content }}{% endfor %}")
    for _ in range(4):
        assert len(template.render({"messages": [{"role": "user", "content": "x" * 500}]})) == 25_000_000


def test_a_refusal_of_the_template_is_cut(tmp_path: Path) -> None:
    with pytest.raises(MeltError, match="refuses these messages: aaaa") as caught:
        ChatTemplate("{{ raise_exception('a' * 1000000) }}").render({})
    assert len(str(caught.value)) < 1100
