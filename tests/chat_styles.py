"""Chat templates in the styles of current models, written for these tests.

Each uses the features its family relies on.
"""

# ruff: noqa: E501 (templates have long lines)

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] if loop.first and system else m['content'] %}
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") if false else "26 Jul 2024" %}{% endif %}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one tool call at once") }}{% endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{% endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_MASKED = """{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}
{% endfor %}"""

QWEN_3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("After the optional system message, roles must alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles are supported") }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' }}
{%- if message.content is string %}{{ message.content | trim }}
{%- elif message.content is iterable %}
{%- for item in message.content %}{% if item['type'] == 'image' %}{{ image_token }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}
{%- else %}{{ raise_exception('Invalid content type') }}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_first = false -%}
{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}{{'<｜Assistant｜>' + (message['content'] or '') + '<call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```'}}{%- set ns.is_first = true -%}
{%- else %}{{'\\n' + tool['function']['name']}}{%- endif %}{%- endfor %}{{ eos_token }}{%- endif %}
{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}
{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + eos_token}}{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{%- if ns.is_output_first %}{{'<out>' + message['content']}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n<out>' + message['content']}}{%- endif %}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

MACROS = """{%- macro render_type(spec) -%}
{%- if spec.enum -%}{{ spec.enum | map('tojson') | join(' | ') }}
{%- elif spec.type == 'array' -%}{{ render_type(spec['items']) }}[]
{%- elif spec.type == 'object' and spec.properties -%}{ {%- for name, inner in spec.properties.items() %} {{ name }}{{ '' if name in (spec.required or []) else '?' }}: {{ render_type(inner) }}{{ ',' if not loop.last }}{% endfor %} }
{%- else -%}{{ spec.type | default('any') }}{%- endif -%}
{%- endmacro -%}
{%- macro wrap(role, kind='text') -%}<|{{ role }}:{{ kind }}|>{{ caller() if caller else '' }}<|end|>{%- endmacro -%}
{%- if tools %}{% for tool in tools | map(attribute='function') | sort(attribute='name') %}
type {{ tool.name | title | replace('_', '') }} = {{ render_type(tool.parameters) }}; // {{ tool.description | default('none', true) | indent(2) }}
{% endfor %}{% endif -%}
{% for message in messages %}{% call wrap(message.role) %}{{ message.content | default('') }}{% endcall %}
{% endfor %}{% filter upper %}{{ messages | length }} messages{% endfilter %}
{% set block %}{{ messages[-1].role }}{% endset %}[{{ block }}]"""

LANGUAGE = """{%- for m in messages -%}
{%- if loop.index0 > 3 %}{% break %}{% endif -%}{%- if m.role == 'system' %}{% continue %}{% endif -%}
{{ loop.index }}/{{ loop.length }} {{ loop.cycle('odd', 'even') }} {{ loop.previtem.role if not loop.first else '-' }} {{ loop.nextitem.role if loop.nextitem is defined else '-' }} {{ loop.changed(m.role) }}
{% else %}none{% endfor -%}
{{ messages | map(attribute='role') | unique | list }} {{ messages | groupby('role') | map('first') | list }}
{{ messages | rejectattr('role', 'in', ['user', 'system']) | map(attribute='content') | map('length') | sum }}
{{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1.5 | round | int }} {{ '%s-%05.2f' | format('a', 3.14159) }} {{ '{:>6}|{!r}'.format('b', 'c') }}
{{ 'ab' * 3 ~ 1 ~ none ~ true }} {{ [1, 2] + [3] }} {{ (1, 'x') }} {{ {'k': [1, {'z': none}]} }} {{ 'b' in 'abc' and 2 not in [1] }} {{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }}
{{ [3, 1, 2] | sort(reverse=true) | join(',') }} {{ 'a,b,,c'.split(',') }} {{ ' x '.strip() }} {{ 'x'.center(5) }}| {{ 'Hello'[::-1] }} {{ 'Hello'[1:3] }} {{ dict(a=1, b=2) | dictsort }}
{{ range(3) | list }} {{ range(10) | batch(4, 0) | list }} {{ range(7) | slice(3) | list }} {{ missing_thing is defined }} {{ missing_thing | default('d') }} {{ missing_thing }}
{{ '<a & b>' }} {{ '<a & b>' | e }} {{ '<b>' | safe }} {{ ('<b>{}</b>' | safe).format('<') }} {% autoescape true %}{{ '<' }}{{ messages[0].content ~ ('>' | safe) }}{% endautoescape %}
{% for i in [1, [2, [3]]] recursive %}{{ i if i is number else loop(i) }};{% endfor %} {% for k, v in {'x': 1, 'y': 2}.items() if v > 1 %}{{ k }}={{ v }}{% endfor %}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %} {{ 'x' if false }} {{ none }} {{ true }} {{ 1e3 }} {{ 0.1 + 0.2 }} {{ namespace(a=1).a }} {{ cycler('a', 'b').next() }} {{ joiner(', ')() }}
{{ 'the quick fox' | capitalize }} {{ 'a b' | wordcount }} {{ 'abc' | first }}{{ 'abc' | last }} {{ [1, 2, 3] | max }} {{ 'text' | truncate(3, true, '..') }} {{ 'a\\nb' | indent(4, true) }} {{ 'é' | urlencode }} {{ 'x y' | tojson }} {{ [1, 2] | tojson(indent=2) }} {{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}
{{ 12345 | filesizeformat }} {{ '12' | int + 1 }} {{ 'q' | int(5) }} {{ '2.5' | float }} {{ 'a b c d' | wordwrap(3) }} {{ '<p>x</p>' | striptags }} {{ 'abc' | replace('b', 'BB') }} {{ ['a', 'B'] | map('upper') | list }} {{ 'x' is string }} {{ 4 is divisibleby 2 }} {{ [] is iterable }} {{ 'a' is in 'abc' }} {{ 'A' is upper }} {{ {}.get('a', 'b') }} {{ 'a-b'.partition('-') }} {{ 'abc'.find('c') }} {{ 'a'.join(['x', 'y']) }} {{ 'x' | list }} {{ 'abcabc'.rfind('b') }} {{ (5).bit_length() }} {{ (2.0).is_integer() }}"""

TOKENS = """{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token is defined }}|{{ mask_token is defined }}|{{ image_token }}|{{ audio_token is defined }}
{% if tools is none %}no tools{% endif %}{% if documents is none %} no documents{% endif %} {{ tools is defined }} {{ add_generation_prompt }}
{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}
{{ strftime_now('%Y') | length }}"""

STYLES = {
    name.lower(): template
    for name, template in globals().items()
    if name.isupper() and name != "STYLES" and isinstance(template, str)
}
