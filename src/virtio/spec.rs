//! Numbers of the virtio 1.2 specification, each with the section that gives it.

/// Feature bits that belong to transport and queues (§6); a device names none of them.
pub mod feature {
    /// A chain may be given as a table of its own (§2.7.5.3).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index (§2.7.7.2, §2.7.10).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device is no legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Device status bits (§2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is over.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on without a reset.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Registers of virtio-mmio, as offsets into its window (§4.2.2).
pub mod register {
    /// `virt`
    pub const MAGIC_VALUE: u64 = 0x000;
    /// Version of the layout.
    pub const VERSION: u64 = 0x004;
    /// Kind of device.
    pub const DEVICE_ID: u64 = 0x008;
    /// Who made it.
    pub const VENDOR_ID: u64 = 0x00c;
    /// Offered features, 32 of them.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Which 32.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// Accepted features, 32 of them.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Which 32.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Which queue the queue registers mean.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Largest size of the queue; 0 if there is no such queue.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// Size of the queue.
    pub const QUEUE_NUM: u64 = 0x038;
    /// Whether the queue is in use.
    pub const QUEUE_READY: u64 = 0x044;
    /// The driver has made buffers available in the queue whose number is written.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Why the device interrupts.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// The driver has seen these reasons.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Device status; writing 0 resets the device.
    pub const STATUS: u64 = 0x070;
    /// Address of the descriptor table, low half.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// The same, high half.
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    /// Address of the available ring, low half.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// The same, high half.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    /// Address of the used ring, low half.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// The same, high half.
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// First register of the shared memory regions, which no device here has.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// Last of them.
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    /// Changes with the configuration space.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// First byte of the configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// Value of [`register::MAGIC_VALUE`]: `virt`, little endian (§4.2.2).
pub const MAGIC: u32 = 0x7472_6976;
/// Value of [`register::VERSION`] (§4.2.2).
pub const VERSION: u32 = 2;

/// Bits of [`register::INTERRUPT_STATUS`] (§4.2.2).
pub mod interrupt {
    /// A used ring has new entries.
    pub const USED_RING: u32 = 1;
    /// The configuration space or the status has changed.
    pub const CONFIG: u32 = 2;
}

/// Descriptor flags and layout (§2.7.5).
pub mod descriptor {
    /// Another descriptor follows.
    pub const NEXT: u16 = 1;
    /// The device writes to the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Size of a descriptor in bytes.
    pub const BYTES: u32 = 16;
}

/// The driver wants no interrupts from this queue (§2.7.7).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Largest size of a queue (§2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// The block device (§5.2).
pub mod block {
    /// Device number (§5).
    pub const ID: u32 = 2;

    /// Feature bits (§5.2.3).
    pub mod feature {
        /// `seg_max` holds.
        pub const SEG_MAX: u64 = 1 << 2;
        /// The device refuses writes.
        pub const RO: u64 = 1 << 5;
        /// `blk_size` holds.
        pub const BLK_SIZE: u64 = 1 << 6;
        /// The device can flush.
        pub const FLUSH: u64 = 1 << 9;
        /// The topology fields hold.
        pub const TOPOLOGY: u64 = 1 << 10;
        /// `num_queues` holds.
        pub const MQ: u64 = 1 << 12;
        /// The device can discard.
        pub const DISCARD: u64 = 1 << 13;
        /// The device can write zeroes.
        pub const WRITE_ZEROES: u64 = 1 << 14;
    }

    /// Request types (§5.2.6).
    pub mod request {
        /// Read.
        pub const IN: u32 = 0;
        /// Write.
        pub const OUT: u32 = 1;
        /// Flush.
        pub const FLUSH: u32 = 4;
        /// Ask for the device's name.
        pub const GET_ID: u32 = 8;
        /// Discard.
        pub const DISCARD: u32 = 11;
        /// Write zeroes.
        pub const WRITE_ZEROES: u32 = 13;
    }

    /// The device may give the range back to the host (§5.2.6).
    pub const WRITE_ZEROES_FLAG_UNMAP: u32 = 1;
    /// Length of a request's header (§5.2.6).
    pub const HEADER_BYTES: u32 = 16;
    /// Length of the device's name (§5.2.6).
    pub const ID_BYTES: usize = 20;

    /// Status of a request (§5.2.6).
    pub mod status {
        /// Done.
        pub const OK: u8 = 0;
        /// Failed.
        pub const IOERR: u8 = 1;
        /// Unknown or not offered.
        pub const UNSUPP: u8 = 2;
    }
}

/// The entropy device (§5.4).
pub mod rng {
    /// Device number (§5).
    pub const ID: u32 = 4;
}

/// The memory balloon (§5.5).
pub mod balloon {
    /// Device number (§5).
    pub const ID: u32 = 5;

    /// Feature bits (§5.5.3).
    pub mod feature {
        /// There is a statistics queue.
        pub const STATS_VQ: u64 = 1 << 1;
        /// The driver may take pages back when the guest runs out of memory.
        pub const DEFLATE_ON_OOM: u64 = 1 << 2;
        /// The driver says what free pages contain.
        pub const PAGE_POISON: u64 = 1 << 4;
        /// The driver reports free pages.
        pub const PAGE_REPORTING: u64 = 1 << 5;
    }

    /// Page frame numbers are in units of 4 KiB whatever the guest's pages are (§5.5.6).
    pub const PAGE_SHIFT: u32 = 12;
    /// A page frame number's length.
    pub const PFN_BYTES: usize = 4;
    /// Length of a statistic: tag and value (§5.5.6.3).
    pub const STAT_BYTES: usize = 10;
    /// Tags of statistics: the ten of §5.5.6.4, and six that Linux added since.
    pub const STAT_TAGS: usize = 16;
}

/// The console (§5.3).
pub mod console {
    /// Device number (§5).
    pub const ID: u32 = 3;

    /// Feature bits (§5.3.3).
    pub mod feature {
        /// `cols` and `rows` hold.
        pub const SIZE: u64 = 1 << 0;
    }

    /// Input, for the driver to receive (§5.3.2).
    pub const RECEIVE: u16 = 0;
    /// Output, which the driver transmits (§5.3.2).
    pub const TRANSMIT: u16 = 1;
}

/// The file system device (§5.11).
pub mod fs {
    /// Device number (§5).
    pub const ID: u32 = 26;
    /// Length of the tag (§5.11.4).
    pub const TAG_BYTES: usize = 36;
}

/// The socket device (§5.10).
pub mod vsock {
    /// Device number (§5).
    pub const ID: u32 = 19;
    /// The host's address (§5.10.4).
    pub const HOST_CID: u64 = 2;
    /// The port that stands for any, so that no connection has it.
    pub const PORT_ANY: u32 = u32::MAX;

    /// Feature bits (§5.10.3).
    pub mod feature {
        /// Stream sockets.
        pub const STREAM: u64 = 1;
    }

    /// Queues, by number (§5.10.2).
    pub mod queue {
        /// Packets for the guest.
        pub const RX: u16 = 0;
        /// Packets from the guest.
        pub const TX: u16 = 1;
        /// Events for the guest.
        pub const EVENT: u16 = 2;
    }

    /// Length of a packet's header (§5.10.6).
    pub const HEADER_BYTES: u32 = 44;
    /// Type of a stream packet (§5.10.6).
    pub const TYPE_STREAM: u16 = 1;

    /// Operations (§5.10.6).
    pub mod op {
        /// Asks for a connection.
        pub const REQUEST: u16 = 1;
        /// Agrees to it.
        pub const RESPONSE: u16 = 2;
        /// There is no such connection, or no more.
        pub const RST: u16 = 3;
        /// The sender will not receive, or send, any more.
        pub const SHUTDOWN: u16 = 4;
        /// Data.
        pub const RW: u16 = 5;
        /// Tells of room.
        pub const CREDIT_UPDATE: u16 = 6;
        /// Asks for room.
        pub const CREDIT_REQUEST: u16 = 7;
    }

    /// Flags of a [`op::SHUTDOWN`] (§5.10.6.5).
    pub mod shutdown {
        /// The sender receives no more.
        pub const RECEIVE: u32 = 1;
        /// The sender sends no more.
        pub const SEND: u32 = 2;
        /// Both.
        pub const BOTH: u32 = 3;
    }

    /// Event: all connections are gone, and the guest's address may be another one (§5.10.6.7).
    pub const EVENT_TRANSPORT_RESET: u32 = 0;
}
