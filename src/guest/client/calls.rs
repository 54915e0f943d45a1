//! Each request as a method.

use std::io::{self, Read, Write};

use super::{Client, Error, Pending, end_writing};
use crate::guest::protocol::{
    Configuration, ContainerInfo, FileInfo, ProcessInfo, Reply, Request, Stats, Target,
};
use crate::guest::spec::{ContainerSpec, Limits, ProcessSpec, WindowSize};

/// The answer is of another kind.
const OTHER: Error = Error::Unexpected("an answer to another question");

impl Client {
    fn done(&mut self, request: Request) -> Result<(), Error> {
        match self.call(request)? {
            Reply::Done => Ok(()),
            _ => Err(OTHER),
        }
    }

    fn started(&mut self, request: Request) -> Result<u32, Error> {
        match self.call(request)? {
            Reply::Started(pid) => Ok(pid),
            _ => Err(OTHER),
        }
    }

    /// Sets the sandbox up.
    pub fn configure(&mut self, configuration: Configuration) -> Result<(), Error> {
        self.done(Request::Configure(configuration))
    }

    /// Sets the clock, to nanoseconds since 1970.
    pub fn set_clock(&mut self, ns: u64) -> Result<(), Error> {
        self.done(Request::SetClock(ns))
    }

    /// Gets ready to be saved.
    pub fn settle(&mut self) -> Result<(), Error> {
        self.done(Request::Settle)
    }

    /// Mounts the sandbox's shared folder, which has this tag. Once is enough; again is no error.
    pub fn mount_share(&mut self, tag: &str) -> Result<(), Error> {
        self.done(Request::MountShare { tag: tag.into() })
    }

    /// Makes a container, all but its process.
    pub fn create(&mut self, spec: ContainerSpec) -> Result<(), Error> {
        self.done(Request::CreateContainer(Box::new(spec)))
    }

    /// Starts a container's first process; its number in the VM comes back.
    pub fn start(&mut self, container: &str) -> Result<u32, Error> {
        self.started(Request::Start { container: container.into() })
    }

    /// Starts a process in a running container under a number other than 0.
    pub fn exec(&mut self, container: &str, process: u32, spec: ProcessSpec) -> Result<u32, Error> {
        self.started(Request::Exec { container: container.into(), process, spec: Box::new(spec) })
    }

    /// Sends a signal.
    pub fn signal(&mut self, container: &str, target: Target, signal: i32) -> Result<(), Error> {
        self.done(Request::Signal { container: container.into(), target, signal })
    }

    /// Changes the size of a process's terminal.
    pub fn resize(&mut self, container: &str, process: u32, size: WindowSize) -> Result<(), Error> {
        self.done(Request::Resize { container: container.into(), process, size })
    }

    /// Freezes a container.
    pub fn pause(&mut self, container: &str) -> Result<(), Error> {
        self.done(Request::Pause { container: container.into() })
    }

    /// Thaws it.
    pub fn resume(&mut self, container: &str) -> Result<(), Error> {
        self.done(Request::Resume { container: container.into() })
    }

    /// Changes limits.
    pub fn update(&mut self, container: &str, limits: Limits) -> Result<(), Error> {
        self.done(Request::Update { container: container.into(), limits })
    }

    /// What a container uses.
    pub fn stats(&mut self, container: &str) -> Result<Stats, Error> {
        match self.call(Request::Stats { container: container.into() })? {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(OTHER),
        }
    }

    /// A container's processes.
    pub fn processes(&mut self, container: &str) -> Result<Vec<ProcessInfo>, Error> {
        match self.call(Request::Processes { container: container.into() })? {
            Reply::Processes(processes) => Ok(processes),
            _ => Err(OTHER),
        }
    }

    /// The sandbox's containers.
    pub fn containers(&mut self) -> Result<Vec<ContainerInfo>, Error> {
        match self.call(Request::Containers)? {
            Reply::Containers(containers) => Ok(containers),
            _ => Err(OTHER),
        }
    }

    /// Forgets a process that has ended, and its streams.
    pub fn delete_process(&mut self, container: &str, process: u32) -> Result<(), Error> {
        self.done(Request::DeleteProcess { container: container.into(), process })
    }

    /// Removes a container.
    pub fn delete(&mut self, container: &str, force: bool) -> Result<(), Error> {
        self.done(Request::Delete { container: container.into(), force })
    }

    /// What a path inside a container is.
    pub fn stat_path(&mut self, container: &str, path: &str, follow: bool) -> Result<FileInfo, Error> {
        let request = Request::StatPath { container: container.into(), path: path.into(), follow };
        match self.call(request)? {
            Reply::File(info) => Ok(info),
            _ => Err(OTHER),
        }
    }

    /// Writes a path of a container to `to`, as a tar archive.
    pub fn read_archive(&mut self, container: &str, path: &str, to: &mut impl Write) -> Result<(), Error> {
        let stream = self.new_stream()?;
        let request = Request::ReadArchive { container: container.into(), path: path.into(), stream };
        let pending = self.begin(request)?;
        let copied = self.open_stream(stream).map(|mut from| io::copy(&mut from, to));
        self.archived(pending, copied)
    }

    /// Writes what a container has written over its layers to `to`, as one more layer.
    pub fn read_changes(&mut self, container: &str, to: &mut impl Write) -> Result<(), Error> {
        let stream = self.new_stream()?;
        let pending = self.begin(Request::ReadChanges { container: container.into(), stream })?;
        let copied = self.open_stream(stream).map(|mut from| io::copy(&mut from, to));
        self.archived(pending, copied)
    }

    /// Unpacks a tar archive from `from` into a directory of a container.
    pub fn write_archive(&mut self, container: &str, path: &str, from: &mut impl Read) -> Result<(), Error> {
        let stream = self.new_stream()?;
        let request = Request::WriteArchive { container: container.into(), path: path.into(), stream };
        let pending = self.begin(request)?;
        let copied = self.open_stream(stream).map(|mut to| {
            let copied = io::copy(from, &mut to);
            end_writing(&to);
            copied
        });
        self.archived(pending, copied)
    }

    /// The agent's reason counts for more than that the stream has ended.
    fn archived(&mut self, pending: Pending, copied: Result<io::Result<u64>, Error>) -> Result<(), Error> {
        match self.finish(pending)? {
            Reply::Done => copied?.map(drop).map_err(|error| self.failed(error)),
            _ => Err(OTHER),
        }
    }

    /// Brings everything that was written to the disks.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.done(Request::Sync)
    }

    /// Ends all processes and powers the VM off; comes back at once.
    pub fn shutdown(&mut self, timeout_ms: u32) -> Result<(), Error> {
        self.done(Request::Shutdown { timeout_ms })
    }
}
