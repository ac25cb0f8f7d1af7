"""What a person gets wrong at the command line: exit code 2, one line, and what was meant."""

from __future__ import annotations

import pytest
from leyden.server.commands.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sevre"], "did you mean serve?"),
        (["serve", "--max-seqs", "3"], "did you mean --max-num-seqs?"),
        (["serve", "--max_num_seqs=3"], "did you mean --max-num-seqs?"),
        (["serve", "--backend", "seg_la"], "did you mean --linear-backend?"),
        (["serve", "--qqqq"], "see leyden serve --help"),
        (["serve", "--model", "x"], "the model comes without a flag: leyden serve MODEL"),
        (["serve", "--gpu-memory-utilization=0.9"], "the setting is --memory-fraction here"),
        (["serve", "--enable-prefix-caching"], "the prefix cache is on already; --prefix-cache is the setting"),
        (["serve", "--no-enable-prefix-caching"], "the prefix cache is off with --no-prefix-cache"),
        (["serve", "--max-num-batched-token", "9"], "did you mean --max-num-batched-tokens?"),
        (["serve", "--tool-parser=x", "--enforce-eager"], "--tool-parser: did you mean --tool-call-parser?; --enforce"),
        (["serve", "--model-path", "demo"], "the model comes without a flag: leyden serve MODEL"),
        (["serve", "--port"], "expected one argument"),
        (["bench", "htp"], "did you mean http?"),
        (["bench", "http", "--concurency", "3"], "did you mean --concurrency?"),
        (["bench", "http", "--prompt", "ids", "--endpoint", "chat"], "--prompt ids needs --endpoint completions"),
        (["bench", "http", "--url", "nonsense"], "--url nonsense is not an address"),
        (["chat", "--url", "nonsense"], "--url nonsense is not an address such as http://127.0.0.1:8000"),
        (["chat", "--url", "127.0.0.1:8000"], "is not an address such as http://127.0.0.1:8000"),
        (["chat", "--url", "http://localhost:notaport"], "is not an address such as http://127.0.0.1:8000"),
        (["chat", "--url", "http://☃"], "is not an address such as http://127.0.0.1:8000"),
        (["chat", "--url", "http://a..b"], "is not an address such as http://127.0.0.1:8000"),
        (["bench", "http", "--url", "http://x", "--out", "/no/such/x.json"], "there is no folder /no/such"),
        (["bench", "offline", "--engine", "linear_backnd=seg_la"], "did you mean 'linear_backend'?"),
        (["bench", "http", "--rate", "x"], "'x' is not a number above 0"),
        (["info", "--memory-gb", "-1"], "'-1' is not a number above 0"),
        (["info", "/nowhere"], "'/nowhere' is neither a folder nor a hub id"),
        (["generate", "x", "--temperature", "nan"], "temperature must be in [0.0, 100.0], got nan"),
        (["generate", "x", "--max-tokens", "-5"], "max_tokens must be in [0, 2147483647], got -5"),
    ],
)
def test_usage_error_exits_2_and_suggests_the_right_flag(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
