"""Chat templates of Qwen3.5, 3.6 and 3.8, written from a description of what the official ones render and refuse."""

from __future__ import annotations

XHIGH = (
    "Reasoning effort is set to xhigh. Please think carefully through the task, validate key assumptions, consider "
    "plausible alternatives, and prioritize correctness, consistency, and clarity in the final answer."
)
LOW = (
    "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the conclusion without "
    "unnecessary elaboration."
)
INSTRUCTIONS = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format
</IMPORTANT>"""

EFFORT = f"""
{{%- set effort = reasoning_effort if reasoning_effort is defined else 'xhigh' %}}
{{%- if effort not in ['xhigh', 'medium', 'low'] %}}{{{{ raise_exception('Unknown reasoning effort.') }}}}{{%- endif %}}
{{%- if effort == 'xhigh' %}}{{%- set ns.lead = '{XHIGH}\\n\\n' %}}{{%- endif %}}
{{%- if effort == 'low' %}}{{%- set ns.lead = '{LOW}\\n\\n' %}}{{%- endif %}}"""

SOURCE = """
{%- set ns = namespace(last=-1, lead='', system='') %}EFFORT
{%- for m in messages %}
  {%- if m.role == 'user' and not (m.content is string and m.content.startswith('<tool_response>')) %}
    {%- set ns.last = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{ raise_exception('No user query found in messages.') }}{%- endif %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content | trim %}{%- endif %}
{%- if tools %}
  {{- '<|im_start|>system\\n' + ns.lead }}
  {{- '# Tools\\n\\nYou have access to the following functions:\\n\\n<tools>' }}
  {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{%- endfor %}
  {{- '\\n</tools>' }}{{ 'INSTRUCTIONS' }}
  {%- if ns.system %}{{ '\\n\\n' + ns.system }}{%- endif %}
  {{- '<|im_end|>\\n' }}
{%- elif ns.system or ns.lead %}
  {{- '<|im_start|>system\\n' + ns.lead + ns.system + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'system' %}
    {%- if not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{%- endif %}
  {%- elif m.role == 'user' %}
    {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if KEEPS %}
      {{- '<think>\\n' + (m.reasoning_content | default('', true) | trim) + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
      {{- ('\\n\\n' if m.content | trim else '') if loop.first else '\\n' }}
      {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
      {%- for key, value in call.function.arguments | items %}
        {{- '<parameter=' + key + '>\\n' }}{{ value if value is string else WRITTEN }}{{ '\\n</parameter>\\n' }}
      {%- endfor %}
      {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{%- endif %}
  {%- else %}
    {{- raise_exception('Unexpected message role.') }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if THINKS %}{{ '<think>\\n' }}{%- else %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

AS_JSON = "value | tojson"
AS_PYTHON = "(value | tojson if value is mapping or value is sequence else value | string)"
ON, OFF = (
    "not (enable_thinking is defined and enable_thinking is false)",
    "enable_thinking is defined and enable_thinking",
)
SINCE_THE_QUESTION = "loop.index0 > ns.last"


def _template(thinks: str, keeps: str, written: str, effort: str = "") -> str:
    source = SOURCE.replace("THINKS", thinks).replace("KEEPS", keeps).replace("WRITTEN", written)
    return source.replace("EFFORT", effort).replace("INSTRUCTIONS", INSTRUCTIONS.replace("\n", "\\n")).strip()


QWEN_3_5 = _template(ON, SINCE_THE_QUESTION, AS_PYTHON)
QWEN_3_5_SMALL = _template(OFF, SINCE_THE_QUESTION, AS_PYTHON)  # 0.8B and 2B
QWEN_3_6 = _template(ON, f"(preserve_thinking is defined and preserve_thinking) or {SINCE_THE_QUESTION}", AS_JSON)
QWEN_3_8 = _template(
    ON, f"preserve_thinking is not defined or preserve_thinking or {SINCE_THE_QUESTION}", AS_JSON, EFFORT
)
TEMPLATES = {"3.5": QWEN_3_5, "3.5 small": QWEN_3_5_SMALL, "3.6": QWEN_3_6, "3.8": QWEN_3_8}
