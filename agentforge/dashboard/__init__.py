"""The dashboard: a page on this machine from which chains are started, watched, paused, resumed, aborted and compared.

runs.py       what a run is: started, paused, resumed and aborted, and read from the disk; knows no page
frontier.py   rate against quality, from the reports and from the runs
app.py        the page, which shows what these two read
hosts.py      what is served: the page, to whoever asks for it by the name of this machine
server.py     serves it to this machine alone
worker.py     the process of a run
"""
