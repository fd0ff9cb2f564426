"""Answering with a trained model, which every file here takes as an argument.

Read them in this order:

    answer.py        from questions to the texts of their answers
    generation.py    what LLaVA.generate does: requests of the engine, or beam search
    engine.py        continuous batching, prefix cache, captured step
    cache.py         keys and values of what has been read
    sampling.py      the choice of a token
    fast_linears.py  faster products for decoding
    beam.py          beam search
    streaming.py     text from tokens: stop strings and incomplete characters
    job_queue.py     the queue behind serve.py
"""
