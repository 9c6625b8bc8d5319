"""Short ways to write OpenAI-style messages and the markup of calls."""

EOS = "<｜end▁of▁sentence｜>"

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"é": [1]}}}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def system(content, **fields):
    return {"role": "system", "content": content, **fields}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(call_id, arguments, name="f"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def block(*calls):
    return "<｜DSML｜tool_calls>\n" + "".join(c + "\n" for c in calls) + "</｜DSML｜tool_calls>"


def invoke(name, *parameters):
    inside = "\n".join(parameters)
    return f'<｜DSML｜invoke name="{name}">\n{inside}\n</｜DSML｜invoke>'


def parameter(key, value, is_string="true"):
    start = f'<｜DSML｜parameter name="{key}" string="{is_string}">'
    return f"{start}{value}</｜DSML｜parameter>"


CALL = invoke("f", parameter("x", "a<b"), parameter("n", '{"k": [1, null]}', "false"))
ARGUMENTS = '{"x": "a<b", "n": {"k": [1, null]}}'
BLOCK = block(CALL)


def calls_of(message):
    """Name and arguments of each call."""
    calls = [c["function"] for c in message["tool_calls"]]
    return [(c["name"], c["arguments"]) for c in calls]
