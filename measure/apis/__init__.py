"""How servers are asked and what their answers say: TGI and OpenAI-style APIs, streams, tokens, refusals. No I/O."""
