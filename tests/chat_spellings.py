"""Tool calls in other spellings than the official one, broken ones and hostile ones."""

from chat_messages import ARGUMENTS, BLOCK, CALL, EOS, block

PLAIN = BLOCK.replace("｜DSML｜", "")
INSIDE = "\n".join(BLOCK.split("\n")[1:-1])

# Markup of one call to f, and what is reported of it.
SLIPS = [
    (BLOCK.replace("｜DSML｜", "DSML｜"), "official form"),
    (BLOCK.replace("｜DSML｜", "|DSML|"), "official form"),
    (BLOCK.replace("｜DSML｜", "DSML|"), "official form"),
    (BLOCK.replace("｜DSML｜", ""), "official form"),
    (BLOCK.replace("\n", ""), "official form"),
    (BLOCK.replace("\n", "\n\n  "), "official form"),
    (BLOCK.replace("</｜DSML｜", "</DSML｜"), "official form"),
    (BLOCK.replace('x" string="true"', 'x"'), "official form"),
    (BLOCK.removesuffix("</｜DSML｜tool_calls>"), "not closed"),
    (BLOCK + "\n", "text after the tool calls"),
]
# The same, not official but read.
MENDED = [
    (BLOCK.replace("tool_calls", "function_calls"), "a block named function_calls"),
    (BLOCK.replace("tool_calls", "toolcalls"), "a block named toolcalls"),
    (BLOCK.replace("<｜DSML｜tool_calls>", "<｜DSML｜function_calls>"), "a block named"),
    (PLAIN.replace("tool_calls", "function_calls"), "a block named function_calls"),
    (INSIDE, "no block around the calls"),
    (INSIDE + "\n</｜DSML｜tool_calls>", "no block around the calls"),
    (INSIDE.replace("｜DSML｜", ""), "no block around the calls"),
    (INSIDE.replace("｜DSML｜", "|DSML|"), "no block around the calls"),
    (BLOCK.replace('"f"', "'f'"), "name without straight double quotes"),
    (BLOCK.replace('"f"', "“f”"), "name without straight double quotes"),
    (BLOCK.replace('"f"', "”f”"), "name without straight double quotes"),
    (BLOCK.replace('"f"', "f"), "name without straight double quotes"),
    (BLOCK.replace('"x"', "‘x’"), "name without straight double quotes"),
    (BLOCK.replace('"true"', "'true'"), "string without straight double quotes"),
    (BLOCK.replace('"f"', '"f" id="1"'), "the attribute id of f passed over"),
    (BLOCK.replace('name="f"', 'id="1" name="f"'), "the attribute id of f passed over"),
    (BLOCK.replace('"x"', '"x" type="text"'), "the attribute type of x passed over"),
    (BLOCK.replace('name="x" string="true"', 'string="true" name="x"'), "official form"),
    (BLOCK.replace("<｜DSML｜invoke", "< ｜DSML｜ invoke "), "official form"),
    (BLOCK.replace('name="x"', ' name = "x" '), "official form"),
    (BLOCK.replace("</｜DSML｜", "</ ｜DSML｜ "), "official form"),
    (BLOCK.replace("parameter>", "parameter >"), "official form"),
    (BLOCK.replace(">\n", " >\n"), "official form"),
    (BLOCK.replace("</｜DSML｜", "</"), "official form"),
    (
        block(f'<｜DSML｜invoke name="f">\n{ARGUMENTS}\n</｜DSML｜invoke>'),
        "JSON as the body of f",
    ),
    (block(f'<｜DSML｜invoke name="f">{ARGUMENTS}</｜DSML｜invoke>'), "JSON as the body of f"),
]
# What stands beside calls and is none.
BAD = [
    '<｜DSML｜invoke nam="g">\n\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g>\n\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="">\n\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g" name="h">\n\n</｜DSML｜invoke>',
    '<｜DSML｜call name="g">\n\n</｜DSML｜call>',
    '<｜DSML｜invoke name="g">\n\n</｜DSML｜invok>',
    '<｜DSML｜invoke name="g">\n[1, 2]\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\n{"x": 1\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\n{"x": NaN}\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\n{"x": 1e999}\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\n{"x": 1} and\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\nls\n</｜DSML｜invoke>',
    '<｜DSML｜invoke name="g">\n<｜DSML｜parameter name="x" string="yes">1</｜DSML｜parameter>',
    '<｜DSML｜invoke name="g">\n<｜DSML｜parameter string="true">1</｜DSML｜parameter>',
    '<｜DSML｜invoke name="g">\n<｜DSML｜arg name="x" string="true">1</｜DSML｜arg>',
    "Then:",
    "</｜DSML｜parameter>",
]
# Pieces that a slow reader would take hours for if they are repeated.
HOSTILE = [
    *("<", "< ", "</", '"', "</｜DSML｜param>", "<｜DSML｜parameter ", '<｜DSML｜invoke name="f'),
    '<｜DSML｜invoke name="$f">\n',
    '<｜DSML｜invoke name="f">\n',
    '<｜DSML｜invoke name="f">{"a": ',
    "<｜DSML｜invoke name='f'>{\"",
    '<｜DSML｜parameter name="x" string="true">',
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    '\n<invoke name="f">\n</invoke>x',
    '\n<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n',
    '\n<tool_calls>\n<invoke name="f">',
    "\n```\n<invoke name='f'>",
    "[" * 50 + "{",
    "</think>" + EOS,
]
# What texts are put together from that are hard to read.
PIECES = [EOS, "<think>", "</think>", "<｜User｜>", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"]
PIECES += [
    "<tool_calls>",
    "</tool_calls>",
    "｜DSML｜",
    "<｜DSML｜invoke",
    ' name="f">',
    "\n",
    "\n\n",
]
PIECES += ["</｜DSML｜invoke>", "<invoke", "</invoke>", '" string="false">', '" string="true">']
PIECES += ["<｜DSML｜parameter", "</｜DSML｜parameter>", '<parameter name="x">', "</parameter>"]
PIECES += [CALL, BLOCK, "|DSML|", "{", "1", "<", ">", "/", '"', " "]
