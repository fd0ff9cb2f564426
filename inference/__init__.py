"""Answers of a trained model, which every file here takes as an argument.

Read the files in this order, from the question to the token:

    answer.py        from questions to the texts of their answers
    generation.py    what LLaVA.generate does: requests of the engine, or beam search
    engine.py        decoding: continuous batching, prefix cache, captured step
    cache.py         the keys and values of what has been read
    sampling.py      the choice of the next token
    fast_layers.py   faster linear layers, norms and rotations for decoding
    cpu.py           those of a CPU, which cpu.cpp computes
    beam.py          beam search, which uses the cache without the engine

and then, from the tokens back to those who asked:

    streaming.py     text from tokens: stop strings and incomplete characters
    job_queue.py     the queue behind serve.py

To change how a token is chosen, edit sampling.py; to change what a step computes, `Engine._forward`
and `Cache.step`. Every answer is checked against decoding without a cache
(tests/tools/no_cache.py).
"""
