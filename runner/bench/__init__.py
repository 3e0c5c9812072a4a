"""A closed-loop load generator for OpenAI endpoints: N clients, each of which asks again when its answer has ended.

    job.py        what is asked of whom
    prompts.py    deterministic prompts of a wanted length, no two alike
    http.py       one connection: HTTP/1.1 parsed as it arrives
    answer.py     what is in an answer, and when it came
    clients.py    the clients of one process
    worker.py     that process; workers.py starts several and shares a level among them
    figures.py    measurements → percentiles
    run.py        the order of it all: look at the server, calibrate, warm up, level by level

It measures what a user of the server sees. It uses asyncio and msgspec, and nothing else of this project.
"""
