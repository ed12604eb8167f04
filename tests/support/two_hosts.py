"""`fedara` on MPI where one machine plays hosts of two processes: two_hosts.py ARGS."""

from functools import partial

from bench.cli import main
from fedara_core.comm.launch import BACK_ENDS
from fedara_core.comm.mpi import MpiCommunicator
from fedara_core.comm.node import NodeCommunicator

if __name__ == "__main__":
    BACK_ENDS["mpi"] = partial(MpiCommunicator, host_processes=2)
    BACK_ENDS["mpi-node"] = partial(NodeCommunicator, host_processes=2)
    main()
