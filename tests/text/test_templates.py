"""Templates from outside end, in bounded time and memory; those of real models are rendered as `transformers` does."""

import functools
import resource

import pytest
from transformers import PreTrainedTokenizerFast

from lfm_jax.testing import tiny_tokenizer
from lfm_jax.text import templates
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat
from lfm_jax.text.templates import MAX_TEMPLATE, check_template

MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "x" * 1000, "n": 3},
    {"role": "assistant", "content": "**b** {c}", "calls": [{"name": "f", "arguments": {"b": 1, "a": [2, None]}}]},
]  # fmt: skip
DOUBLED = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = DOUBLE %}{% endfor %}"
LAUGHS = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}" \
         "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"  # fmt: skip
WALL = "a" * 99_999

TOO_MUCH = [
    # Loops that do not end, or not in time.
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set a = f(n - 1) %}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for i in [[1, 2]] recursive %}{{ loop([[1, 2]]) }}{{ loop([[1, 2]]) }}{% endfor %}",
    "{% set r = range(99999) | list %}{% for i in r %}{% if r | map('string') | list %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    # Output.
    "{% for i in range(99999) %}" + WALL + "{% endfor %}",
    "{% macro f() %}{% for i in range(99999) %}" + WALL + "{% endfor %}{% endmacro %}{{ f() | length }}",
    "{% set x %}{% for i in range(99999) %}" + WALL + "{% endfor %}{% endset %}{{ x | length }}",
    "{% for i in range(99999) %}{{ messages | tojson }}{{ messages }}{% endfor %}",
    # Texts and lists that grow by multiplication.
    "{{ 'x' * 10 ** 10 }}", "{{ 10 ** 10 * 'x' }}", "{{ [0] * 10 ** 9 }}", "{{ ('xx' * 4000000) * 4000000 }}",
    "{{ ('x' * 9999999) | replace('', 'x' * 9999999) }}", "{{ ('x' * 9999999).replace('x', 'y' * 9999999) }}",
    "{{ ('x' * 9999999).join(range(99999) | map('string')) }}", "{{ range(99999) | join('x' * 9999999) }}",
    "{{ ([('x' * 9999999)] * 9999) | join }}", "{{ 'x'.translate({120: 'y' * 9999999}) * 999 }}",
    "{{ ('x' * 9999999).translate({120: 'y' * 9999999}) }}",
    *(DOUBLED.replace("DOUBLE", double) for double in (
        "ns.x + ns.x", "ns.x ~ ns.x", "ns.x * 2", "ns.x.replace('x', 'xx')", "'%s%s' % (ns.x, ns.x)",
        "'{0}{0}'.format(ns.x)", "[ns.x, ns.x] | join", "('%s' * 2) | format(ns.x, ns.x)", "ns.x.join([ns.x, ns.x])",
        "ns.x | list + ns.x | list",
    )),
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = x %}{% endfor %}",
    "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED.replace("DOUBLE", "twice(ns.x)"),
    # Widths.
    "{{ 'x' | center(10 ** 10) }}", "{{ 'x'.ljust(10 ** 10) }}", "{{ '1'.zfill(10 ** 10) }}",
    "{{ '{:>9999999999}'.format(1) }}", "{{ '{:>{w}}'.format(1, w=10 ** 10) }}", "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}", "{{ '%9999999999d' | format(1) }}", "{{ '\\t'.expandtabs(10 ** 10) }}",
    "{{ '\\n\\n' | indent(10 ** 10) }}", "{{ [[1]] | tojson(indent=10 ** 10) }}", "{{ 1.5 | round(10 ** 10, 'ceil') }}",
    "{{ [1] | slice(10 ** 10) | list }}", "{{ [1] | batch(10 ** 10, 0) | list }}", "{{ (5).to_bytes(10 ** 10) }}",
    "{{ ('%9999d' * 99999) % 1 }}",
    # Numbers.
    "{{ 10 ** (10 ** 10) }}", "{{ 2 ** (2 ** 40) }}", "{{ 10 ** 9999 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ('f' * 9999999) | int(0, 16) + 1 }}",
    # Lists that hold each other, so that a line of them prints as a library.
    *(LAUGHS + use for use in (
        "{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x | string }}", "{{ ns.x ~ '' }}", "{{ '%s' % ns.x }}", "{{ ns }}",
        "{{ '{}'.format(ns.x) }}", "{% if ns.x == ns.y %}{% endif %}", "{% if ns.x is eq(ns.y) %}{% endif %}",
        "{% if [ns.x] | select('eq', ns.y) | list %}{% endif %}", "{% if [ns.x] in [[ns.y]] %}{% endif %}",
        "{{ {'a': ns.x}.items() }}", "{{ [ns.x, ns.y] | sort }}", "{{ namespace(a=ns, b=ns) }}",
    )),
    # Functions that take the square of a text.
    "{{ (('<!--' * 999999) ~ '-->') | striptags }}", "{{ ('www.' * 999999) | urlize }}",
    "{{ ('é' * 999999).encode('punycode') }}", "{{ range(99999) | map('list') | sum([]) }}",
    # Neither does a template that holds itself, a wrong one, or one from elsewhere.
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ lipsum(10 ** 9) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TOO_MUCH, ids=range(len(TOO_MUCH)))
def test_a_template_that_does_too_much_ends(template, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the chat template failed on these messages"):
        render_chat(template, MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB.


def test_what_it_may_make_grows_with_what_it_is_given(monkeypatch):
    monkeypatch.setattr(templates, "MAX_SIZE", 1000)
    template = "{% for m in messages %}{% for i in range(COUNT) %}{{ m.content }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000}] * 9
    assert len(render_chat(template.replace("COUNT", "50"), messages)) == 450_000
    with pytest.raises(ValueError, match="it makes more than"):
        render_chat(template.replace("COUNT", "200"), messages)


def nested(opens, closes, inner="1"):
    return opens * 3000 + inner + closes * 3000


DEEP = [
    "{{ " + nested("(", ")") + " }}", "{{ " + nested("[", "]") + " }}", "{{ " + nested("not ", "") + " }}",
    "{{ " + nested("-", "") + " }}", "{{ " + nested("1 + ", "") + " }}", "{{ x" + nested("[0]", "") + " }}",
    "{% if 1 %}" * 1000 + "{% endif %}" * 1000, "{% for i in x %}" * 400 + "{% endfor %}" * 400,
    "{{ 1" + nested(" | int", "", "") + " }}",
]  # fmt: skip


@pytest.mark.parametrize("template", DEEP, ids=range(len(DEEP)))
def test_a_template_too_deep_is_refused(template):
    with pytest.raises(ValueError, match=r"the chat template is (nested too deep|not valid)"):
        check_template(template)


def test_a_broken_template_is_refused_before_it_is_used():
    check_template(DEFAULT_TEMPLATE)
    for template in ("{% for m in messages %}", "{{ x | no_such_filter }}", "{{", "{% generation %}", "{{ %}"):
        with pytest.raises(ValueError, match="the chat template is not valid Jinja"):
            check_template(template)
    with pytest.raises(ValueError, match=f"at most {MAX_TEMPLATE}"):
        check_template(" " * (MAX_TEMPLATE + 1))


def test_messages_too_deep_are_refused():
    deep: list = []
    for _ in range(500):
        deep = [deep]
    for depth in range(3):
        with pytest.raises(ValueError, match=r"the chat template failed|must be plain data"):
            render_chat("{{ messages | tojson }}{{ messages }}{{ 1 // 0 }}", [{"role": "x", "content": deep}])
        for _ in range(10 ** (depth + 2)):
            deep = [deep]


ORDINARY = {
    "loops": """{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ loop.first }}
{{- loop.last }} {{ loop.previtem is defined }} {{ (loop.nextitem or m).role }} {{ loop.cycle('a', 'b') }}
{{- loop.changed(m.n) }}
{% for x in m if x != 'role' %}{{ x }}{% else %}none{% endfor %}{% endfor %}
{% for x in nothing %}{% else %}no{% endfor %}
{% for k, v in messages[2].calls[0].arguments.items() %}{{ k }}={{ v }}{% endfor %}
{% for x in [[1, [2, [3]]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}""",
    "macros": """{% macro part(m, end='.') %}<{{ m.role }}{{ caller() if caller }}{{ end }}>{% endmacro %}
{% for m in messages %}{{ part(m) }}{{ part(m, end='!') }}{% call part(m) %}{{ m.content }}{% endcall %}{% endfor %}
{% macro fill(ns) %}{% set ns.x = ns.x + 1 %}{% endmacro %}{% set ns = namespace(x=0) %}{{ fill(ns) }}{{ ns.x }}
{% set text %}a{{ ns.x }}b{% endset %}{{ text | upper }}{% filter trim | upper %} x{{ text }} {% endfilter %}""",
    "filters": """{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role',
'equalto', 'user') | list | length }}
{{ messages | rejectattr('calls', 'defined') | map(attribute='content') | first | truncate(9) }}
{{ messages | groupby('role') | map('first') | list }} {{ [3, 1, 2] | sort | reverse | list }} {{ 'a b' | title }}
{{ messages[2].calls | tojson }} {{ messages[2].calls | tojson(indent=2) }} {{ '%s-%03d' | format('a', 7) }}
{{ [1, 2, 3, 4] | batch(2) | list }} {{ [1, 2, 3] | slice(2) | list }} {{ [1, 2] | sum }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ messages | last | length }} {{ 'x\\ny' | indent(2) }} {{ nothing | default('d') }}
{{ '<a>' | escape }}
{{ 2.567 | round(1) }}
{{ '<b>x</b>' | striptags }} {{ 'a b c' | wordwrap(3) }}
{{ messages[::-1] | map(attribute='role') | unique | list }}""",
    "texts": """{{ '**{}** {{x}} {}'.format('a', 1) }} {{ '%s: %d%%' % ('a', 5) }} {{ 'a,b'.split(',') }} {{ 'x' * 3 }}
{{ 'ab'.replace('a', 'c').strip().upper().startswith('C') }} {{ '-'.join(['a', 'b']) }} {{ 'é'.encode() }}
{{ [1] + [2] }} {{ 'a' ~ 1 ~ none }} {{ 'a' in 'abc' }} {{ 1 < 2 < 3 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }}
{{ 1 / 4 }} {{ 'x'.center(5) }}
{{ messages[0].content is string and messages[1].n is not none and messages is sequence and missing is undefined }}
{{ messages[0].get('none', 'd') }} {{ messages[2].calls[0].arguments.keys() | list }} {{ 3 in [1, 3] }} {{ (1, 2) }}""",
}


@functools.cache
def hf_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_templates_are_rendered_as_transformers_does(kind):
    theirs = hf_tokenizer().apply_chat_template(MESSAGES, chat_template=ORDINARY[kind], tokenize=False)
    assert render_chat(ORDINARY[kind], MESSAGES, add_generation_prompt=False) == theirs
    assert len(theirs) > 100


def test_a_long_conversation_has_room():
    """A template that looks at all messages in each turn, and writes all tools into one text."""
    template = """{% set ns = namespace(tools='') %}
{%- for t in tools %}{% set ns.tools = ns.tools + (t | tojson) %}{% endfor %}
{{- ns.tools }}{% for m in messages %}{% if messages | length - 1 == loop.index0 or messages[0] == m %}{% endif %}
{{- '<' + m.role + '>' + (m.content | trim) }}{% endfor %}"""
    messages = [{"role": "user", "content": f"{i} " * 500} for i in range(1500)]
    tools = [{"name": f"f{i}", "description": "d" * 9000} for i in range(128)]
    assert len(render_chat(template, messages, tools=tools)) > 4_000_000
